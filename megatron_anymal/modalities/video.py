"""Video: clips of fixed length, frames sampled by time (AnyMAL section 3.1), decoded with PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from megatron_anymal.config import ConfigError, ModalityConfig
from megatron_anymal.modalities.architecture import transformers_config
from megatron_anymal.modalities.base import MediaError, Modality, count_in_time, require_above
from megatron_anymal.modalities.libraries import library
from megatron_anymal.modalities.pixels import PixelTransform
from megatron_anymal.modalities.registry import register

# Frames of a clip where the encoder sees single frames and states no number.
FRAMES_OF_AN_IMAGE_ENCODER = 8
# A jump this far ahead (seconds) goes by the container's index instead of decoding all that lies between.
SEEK_AHEAD = 10.0
# A container that ends this much (seconds) before its stated end is cut off; less is rounding.
CUT_OFF = 0.5
# FFmpeg states a container's duration in these.
MICROSECONDS = 1_000_000


@dataclass
class VideoOptions:
    """Options of the video modality."""

    # Length of a clip; each clip is one piece.
    clip_seconds: float = 4.0
    # Frames of a clip. 0: the encoder's own number, or 8 with an image encoder.
    num_frames: int = 0
    # Most clips of a video; a longer one is covered by this many, spread evenly over it.
    max_clips: int = 8
    # Side of a frame in pixels. 0: the encoder's own.
    resolution: int = 0
    # Channel statistics on the scale 0 to 1. None: those of the encoder's folder, else its type's usual ones.
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


@contextmanager
def opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """The container and its main video stream.

    Raises:
        MediaError: not a readable video; raised also for decoding errors while the body uses it.
    """
    av = library("av")
    if not data:
        raise MediaError("is empty (0 bytes)")
    try:
        # Unreadable titles and comments do not matter.
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise MediaError("has no video stream: it is another kind of file, or cut off")
            if stream.codec_context is None:
                raise MediaError("is coded in a way that cannot be decoded here")
            # Loader processes already use the cores.
            stream.codec_context.thread_count = 1
            yield container, stream
    except MediaError:
        raise
    # FFmpeg's errors, and what PyAV raises on fields that a damaged file lacks.
    except Exception as error:
        raise MediaError(f"cannot be decoded as a video, it is damaged or cut off: {error}") from error


def _start(stream: Any) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _timing(container: Any, stream: Any) -> tuple[float, float]:
    """Duration in seconds and frames per second of the stream."""
    rate = stream.average_rate or stream.guessed_rate
    if stream.duration is not None:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = _duration_from_packets(container, stream)
    if not rate or duration <= 0:
        raise MediaError("has no frames, or states no frame rate")
    return duration, float(rate)


def _duration_from_packets(container: Any, stream: Any) -> float:
    """Seconds of a stream in a container, such as WebM, that states only when its longest stream ends.

    Raises:
        MediaError: the packets end well before that.
    """
    ends: dict[int, float] = {}
    for packet in container.demux():
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
    stated = (container.duration or 0) / MICROSECONDS
    if stated - max(ends.values(), default=0.0) > CUT_OFF:
        raise MediaError(f"ends at {max(ends.values(), default=0.0):.2f} s of {stated:.2f} s: it is cut off")
    return ends.get(stream.index, 0.0) - _start(stream)


@register("video")
class VideoModality(Modality):
    """A video as clips [frames, 3, R, R]; a frame is stretched to the encoder's resolution R.

    A video encoder takes a clip whole; an image encoder takes its frames one by one.
    """

    extensions: ClassVar[tuple[str, ...]] = ("mp4", "mov", "m4v", "webm", "mkv", "avi")
    Options: ClassVar[type] = VideoOptions

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__(config)
        require_above(self.options, clip_seconds=0, max_clips=0, num_frames=-1)
        self.pixels = PixelTransform(
            config.encoder, self.options.resolution, self.options.image_mean, self.options.image_std
        )
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
    def probe(cls, data: bytes, extension: str, attributes: Mapping[str, Any]) -> tuple[float, float]:
        """Duration in seconds and frames per second, without decoding."""
        with opened(data) as (container, stream):
            return _timing(container, stream)

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """Clips that cover the video; a rest of one frame or less belongs to the clip before it."""
        duration = sizes[:, 0] - 1.0 / sizes[:, 1]
        return count_in_time(duration, self.options.clip_seconds, self.options.max_clips)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """[frames, 3, R, R]."""
        return (self.num_frames, 3, self.pixels.resolution, self.pixels.resolution)

    def sample_times(self, duration: float, clips: int) -> np.ndarray:
        """Seconds at which frames are taken, [clips, frames]: centres of equal intervals of each clip.

        Clips follow each other and the last one ends with the video; where `max_clips` cannot cover the video
        they are spread evenly, the first at its start and the last at its end.
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

    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> torch.Tensor:
        """Clips of the video, [pieces, frames, 3, R, R] float32."""
        side = self.pixels.resolution
        with opened(data) as (container, stream):
            duration, rate = _timing(container, stream)
            times = self.sample_times(duration, pieces).ravel()
            frames = np.empty((times.size, side, side, 3), dtype=np.uint8)
            # Clips may overlap where they are spread, so the times are visited in order, not clip by clip.
            order = np.argsort(times, kind="stable")
            container.seek(0)
            for place, frame in zip(order, _frames_at(container, stream, times[order], rate), strict=True):
                frames[place] = self.pixels.resize(_upright(frame))
        clips = frames.reshape(pieces, self.num_frames, side, side, 3)
        return torch.from_numpy(self.pixels.normalise(clips))


def _upright(frame: Any) -> Any:
    """The frame as an RGB picture, turned as the container's display matrix says (phone videos)."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _frames_at(container: Any, stream: Any, times: np.ndarray, rate: float) -> Iterator[Any]:
    """For each time (ascending seconds) the frame shown then: the last one that starts no later.

    Only the frame before the next one is held.

    Raises:
        MediaError: the frames end before a time, or one that was decoded on the way is damaged.
    """
    start = _start(stream)
    slack = 1e-6 + 1e-3 / rate

    def seconds(frame: Any) -> float:
        if frame.time is None:
            raise MediaError("has frames without a time")
        return frame.time - start

    def check(frame: Any) -> None:
        if frame.is_corrupt:
            raise MediaError(f"is damaged at {seconds(frame):.2f} s")

    decoder = container.decode(stream)
    shown, following, jumped = None, next(decoder, None), False
    for time in times:
        if following is not None and time - seconds(following) > SEEK_AHEAD:
            container.seek(int((time + start) / float(stream.time_base)), stream=stream, backward=True)
            decoder = container.decode(stream)
            shown, following, jumped = None, next(decoder, None), True
            if following is None or seconds(following) > time + slack:
                raise MediaError(f"cannot be read at {time:.2f} s: it is cut off or its index is wrong")
        while following is not None and (shown is None or seconds(following) <= time + slack):
            shown, following = following, next(decoder, None)
            # A damaged frame spoils those predicted from it, which carry no mark. Just behind a jump a mark may
            # only mean that the frame leans on one that was left out.
            if not jumped:
                check(shown)
        if shown is None:
            raise MediaError("has no frame that can be decoded")
        if following is None:
            # A still picture at the end may last long; the container states for how long.
            lasts = max(float((shown.duration or 0) * stream.time_base), 1.5 / rate)
            end = seconds(shown) + lasts
            if time > end + slack:
                raise MediaError(f"ends at {end:.2f} s although a frame at {time:.2f} s is expected: it is cut off")
        check(shown)
        yield shown
