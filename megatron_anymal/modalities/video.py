"""Video: fixed-length clips with frames sampled by time (AnyMAL section 3.1), decoded with PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megatron_anymal.config import DEFAULT_LIMITS, ConfigError, LimitsConfig, ModalityConfig
from megatron_anymal.modalities.architecture import transformers_config
from megatron_anymal.modalities.base import (
    MediaError,
    count_in_time,
    require_above,
    require_loadable,
    require_within,
)
from megatron_anymal.modalities.containers import opened_container, stream_seconds
from megatron_anymal.modalities.frame_pixels import frame_pixels
from megatron_anymal.modalities.libraries import library
from megatron_anymal.modalities.pixels import PixelModality, PixelOptions, PixelTransform
from megatron_anymal.modalities.registry import register
from megatron_anymal.modalities.video_frames import Decoder, PacketTable, frames_at
from megatron_anymal.modalities.video_memory import decoding_bytes

# Default frames per clip for an image encoder, which takes single frames.
FRAMES_OF_AN_IMAGE_ENCODER = 8


@dataclass
class VideoOptions(PixelOptions):
    """Options of the video modality."""

    # Length of a clip in seconds; each clip is one piece.
    clip_seconds: float = 4.0
    # Frames per clip. 0: the encoder's number of frames, or 8 with an image encoder.
    num_frames: int = 0
    # Maximum number of clips per video; in a longer video, this many clips are spread evenly.
    max_clips: int = 8


@contextmanager
def opened(data: bytes, limits: LimitsConfig) -> Iterator[tuple[Any, Any]]:
    """Open the container and its main video stream; checks the frame size against the limits.

    Raises:
        MediaError: as in `opened_container`, or a frame is beyond a limit.
    """
    with opened_container(data, "video", limits) as (container, stream):
        _require_frames(stream.codec_context, stream.codec_context, len(data), limits)
        yield container, stream


def _require_frames(context: Any, frame: Any, file_bytes: int, limits: LimitsConfig) -> None:
    """Refuse frames that exceed a limit.

    Args:
        context: codec context of the stream.
        frame: a frame, or the codec context itself, with the size and pixel format to check.
    """
    width, height = frame.width, frame.height
    what = f"has frames of {width * height} pixels ({width} x {height})"
    require_within(limits, "max_frame_pixels", width * height, what, "scale it down")
    require_loadable(limits, file_bytes, decoding_bytes(context, width, height, frame.format))


def _timing(
    container: Any, stream: Any, limits: LimitsConfig, each: Callable[[Any], None] | None = None
) -> tuple[float, float]:
    """Duration in seconds and frames per second of the stream; `each` is called with its packets."""
    seconds = stream_seconds(container, stream, limits, each)
    rate = stream.average_rate or stream.guessed_rate
    if not rate or seconds <= 0:
        raise MediaError("has no frames, or states no frame rate")
    return seconds, float(rate)


@register("video")
class VideoModality(PixelModality):
    """A video as clips [frames, 3, R, R]; frames are stretched to the encoder's resolution R.

    A video encoder takes a whole clip; an image encoder takes its frames one by one.

    Raises:
        ConfigError: an option is out of range, or does not fit the encoder.
    """

    extensions: ClassVar[tuple[str, ...]] = ("mp4", "mov", "m4v", "webm", "mkv", "avi")
    Options: ClassVar[type] = VideoOptions
    needs_torch: ClassVar[bool] = False
    pieces_grow_with_size: ClassVar[bool] = True

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__(config)
        require_above(self.options, clip_seconds=0, max_clips=0, num_frames=-1)
        self.pixels = PixelTransform(config.encoder, self.options)
        self.num_frames = self.options.num_frames or FRAMES_OF_AN_IMAGE_ENCODER
        if config.encoder.type == "videomae":
            own = transformers_config(config.encoder).num_frames
            if self.options.num_frames not in (0, own):
                raise ConfigError(
                    f"options.num_frames={self.options.num_frames}, but the videomae encoder takes {own} frames. "
                    f"Set it to {own} or 0."
                )
            self.num_frames = own

    @classmethod
    def probe(
        cls, data: bytes, extension: str, attributes: Mapping[str, Any], limits: LimitsConfig = DEFAULT_LIMITS
    ) -> tuple[float, float]:
        """Duration in seconds, from the packets without decoding, and frames per second.

        Raises:
            MediaError: unreadable, without frames or a frame rate, or beyond a limit.
        """
        with opened(data, limits) as (container, stream):
            return _timing(container, stream, limits)

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """Number of clips that cover the video, [n] int64, from [n, 2] durations and frame rates.

        A remainder of at most one frame belongs to the previous clip.
        """
        duration = sizes[:, 0] - 1.0 / sizes[:, 1]
        return count_in_time(duration, self.options.clip_seconds, self.options.max_clips)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """[frames, 3, R, R]."""
        return (self.num_frames, 3, self.pixels.resolution, self.pixels.resolution)

    def sample_times(self, duration: float, clips: int) -> np.ndarray:
        """Sampling times of the frames in seconds, [clips, frames]: centres of equal intervals of each clip.

        Clips are consecutive, and the last one ends with the video. If `max_clips` clips cannot cover the video, they
        are spread evenly from its start to its end.

        Args:
            duration: of the video, in seconds.
        """
        length = self.options.clip_seconds
        if clips < self.options.max_clips or duration <= clips * length:
            starts = np.arange(clips) * length
            ends = np.append(starts[1:], duration)
        else:
            starts = np.linspace(0.0, duration - length, clips) if clips > 1 else np.array([(duration - length) / 2])
            ends = starts + length
        centres = (np.arange(self.num_frames) + 0.5) / self.num_frames
        return starts[:, None] + centres * (ends - starts)[:, None]

    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> np.ndarray:
        """Clips of the video, [pieces, frames, R, R, 3] uint8.

        Raises:
            MediaError: the file is corrupt or truncated, or a frame is beyond a limit.
        """
        return VideoModality.decode_with_size(self, data, extension, attributes)[1]

    def decode_with_size(
        self, data: bytes, extension: str, attributes: Mapping[str, Any]
    ) -> tuple[tuple[float, float], np.ndarray]:
        """Probe and decode a file, reading its packets once before decoding.

        Returns:
            The result of `probe`, and clips, [pieces, frames, R, R, 3] uint8.

        Raises:
            MediaError: as `probe` and `decode`.
        """
        side = self.pixels.resolution
        with opened(data, self.limits) as (container, stream):
            table = PacketTable(Decoder(container, stream))
            seconds, rate = _timing(container, stream, self.limits, table.add)
            times = self.sample_times(seconds, self._count((seconds, rate)))
            frames = np.empty((times.size, side, side, 3), dtype=np.uint8)
            for numbers, frame in frames_at(table, times.ravel(), rate):
                _require_frames(stream.codec_context, frame, len(data), self.limits)
                frames[numbers] = self.pixels.resize(frame_pixels(frame))
        return (seconds, rate), frames.reshape(*times.shape, side, side, 3)


def evenly_spread_pictures(data: bytes, count: int, limits: LimitsConfig = DEFAULT_LIMITS) -> list[Any]:
    """Frames of a video at the centres of `count` equal intervals, as upright RGB images of the video's own size.

    Raises:
        MediaError: the file is corrupt or truncated, or beyond a limit.
    """
    shown: dict[int, Any] = {}
    with opened(data, limits) as (container, stream):
        table = PacketTable(Decoder(container, stream))
        seconds, rate = _timing(container, stream, limits, table.add)
        times = (np.arange(count) + 0.5) * (seconds / count)
        for numbers, frame in frames_at(table, times, rate):
            _require_frames(stream.codec_context, frame, len(data), limits)
            picture = library("PIL.Image").fromarray(frame_pixels(frame))
            shown.update(dict.fromkeys(numbers, picture))
    return [shown[number] for number in range(count)]
