"""Frames that are reached by jumps have the bits of decoding from the start, whatever the codec, GOP and container."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from media import CLIP_SHAPE, section, video_bytes
from photos import photo

from megatron_anymal.modalities import MediaError, build_modality, video_frames
from megatron_anymal.modalities.video import VideoModality

RATE = 10
X264 = {"preset": "veryfast", "x264-params": "keyint=20:min-keyint=20:scenecut=0:bframes=3:b-pyramid=normal"}


def moving(folder: Path, codec: str, container: str, count: int = 300, **settings: Any) -> bytes:
    """A moving window over a photograph, 96 x 64, with a brightness that jitters.

    Args:
        settings: `options` of the encoder, `format` of the container, `gop`; `stamps` in tenths of a second.
    """
    picture = np.asarray(photo("china.jpg"))
    rng = np.random.default_rng(0)
    stamps: Sequence[int] = settings.get("stamps", range(count))
    path = folder / f"made.{container}"
    with av.open(str(path), "w", format=container, options=settings.get("format", {})) as output:
        track = output.add_stream(codec, rate=RATE, options=settings.get("options", {}))
        track.width, track.height, track.pix_fmt = 96, 64, settings.get("pixels", "yuv420p")
        track.gop_size = settings.get("gop", 20)
        track.codec_context.time_base = Fraction(1, RATE)
        for number, stamp in zip(range(count), stamps):
            y, x = (number * 2) % 360, (number * 3) % 540
            window = np.clip(picture[y : y + 64, x : x + 96].astype(int) + rng.integers(-9, 9), 0, 255)
            frame = av.VideoFrame.from_ndarray(window.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, RATE)
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
    return path.read_bytes()


def video(**options: Any) -> VideoModality:
    """Four frames per clip, each a second long, without normalisation."""
    plain = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "num_frames": 4, "clip_seconds": 1.0}
    modality = build_modality("video", section("clip", CLIP_SHAPE, **{**plain, **options}))
    assert isinstance(modality, VideoModality)
    return modality


def by_full_decoding(modality: VideoModality, data: bytes) -> np.ndarray:
    """The sampled frames by the definition, from all frames of the file: [clips, frames, R, R, 3] uint8."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        begin = float((stream.start_time or 0) * stream.time_base)
        frames = [(frame.time - begin, frame.to_image()) for frame in container.decode(stream)]
    seconds, rate = modality.probe(data, "", {})
    [clips] = modality.count_pieces(np.array([(seconds, rate)]))
    times, starts = modality.sample_times(seconds, clips), np.array([start for start, _ in frames])
    shown = np.maximum(np.searchsorted(starts, times + 1e-6 + 1e-3 / rate, side="right") - 1, 0)
    side = (modality.pixels.resolution,) * 2
    return np.stack([[np.asarray(frames[n][1].resize(side, 3)) for n in clip] for clip in shown])


class Watched:
    """How often the decoder was called, and whether everything was decoded from the start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packets, self.fallbacks = 0, 0
        decode, from_the_start = video_frames.Decoder.decode, video_frames._from_the_start

        def counting(decoder: video_frames.Decoder, packet: Any) -> list[Any]:
            self.packets += 1
            return decode(decoder, packet)

        def noting(*arguments: Any) -> Any:
            self.fallbacks += 1
            return from_the_start(*arguments)

        monkeypatch.setattr(video_frames.Decoder, "decode", counting)
        monkeypatch.setattr(video_frames, "_from_the_start", noting)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


VFR = [n * 3 + n % 3 for n in range(300)]
# Codec, container, settings, and the largest share of packets that may be decoded for two of the 30 seconds.
CASES: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "h264, B-frames": ("libx264", "mp4", {"options": X264}, 0.15),
    "h264, one reference": ("libx264", "mp4", {"options": {"x264-params": "ref=1:bframes=0:keyint=20"}}, 0.2),
    "h264 in matroska": ("libx264", "matroska", {"options": X264}, 0.25),
    "h264, fragments": (
        "libx264",
        "mp4",
        {"options": X264, "format": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}},
        0.25,
    ),
    "h264, variable rate": ("libx264", "mp4", {"options": X264, "stamps": VFR}, 0.15),
    "h264, starts later": ("libx264", "mp4", {"options": X264, "stamps": range(7, 307)}, 0.15),
    "h264, slices": (
        "libx264",
        "mp4",
        {"options": {"x264-params": "keyint=20:bframes=3:slices=4:b-pyramid=strict"}},
        0.2,
    ),
    "h265": ("libx265", "mp4", {"options": {"x265-params": "keyint=20:min-keyint=20:open-gop=0:log-level=0"}}, 0.25),
    "h265, open GOP": (
        "libx265",
        "mp4",
        {"options": {"x265-params": "keyint=20:open-gop=1:bframes=3:b-adapt=0:log-level=0"}},
        0.3,
    ),
    "vp8": ("libvpx", "webm", {"options": {"deadline": "realtime", "cpu-used": "8"}}, 0.3),
    "vp9": ("libvpx-vp9", "webm", {"options": {"deadline": "realtime", "cpu-used": "8"}}, 0.3),
    "mjpeg": ("mjpeg", "matroska", {"pixels": "yuvj420p"}, 0.2),
}


@pytest.mark.parametrize("case", CASES)
def test_jumps_give_the_frames_of_full_decoding(case: str, tmp_path: Path, watched: Watched) -> None:
    codec, container, settings, most = CASES[case]
    data = moving(tmp_path, codec, container, **settings)
    few, many = video(max_clips=2), video(max_clips=40, num_frames=3)
    for modality in (few, video(max_clips=1), video(max_clips=7, clip_seconds=2.5), many):
        expected = by_full_decoding(modality, data)
        watched.packets = 0
        np.testing.assert_array_equal(modality.decode(data, container, {}, len(expected)), expected)
        assert watched.fallbacks == 0
        if modality is few:
            assert watched.packets <= most * 300


@pytest.mark.parametrize("case", CASES)
def test_every_frame_can_be_reached_alone_in_any_order(case: str, tmp_path: Path, watched: Watched) -> None:
    """Also those that are displayed before the key frame that precedes them in the file."""
    codec, container, settings, _ = CASES[case]
    data = moving(tmp_path, codec, container, 90, **settings)
    with av.open(io.BytesIO(data)) as opened:
        every = list(opened.decode(video=0))
    with av.open(io.BytesIO(data)) as opened:
        table = video_frames.PacketTable(video_frames.Decoder(opened, opened.streams.video[0]))
        for packet in opened.demux(video=0):
            table.add(packet)
        begin = video_frames.start(opened.streams.video[0])
        for number in np.random.default_rng(0).permutation(len(every)):
            # The wanted frame and one that is half a GOP later, as far as there is one.
            numbers = [int(number), min(int(number) + 9, len(every) - 1)]
            times = np.array([every[n].time - begin + 0.01 for n in numbers])
            frames = {}
            for indexes, frame in video_frames.frames_at(table, times, RATE):
                frames.update(dict.fromkeys(indexes, frame))
            for index, wanted in enumerate(numbers):
                np.testing.assert_array_equal(frames[index].to_ndarray(), every[wanted].to_ndarray())
    assert watched.fallbacks == 0


# Videos whose key frames or times prove nothing, and why: recovery points, packed B-frames, no times of display.
NOT_TRUSTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "open GOP": ("libx264", "mp4", {"options": {"x264-params": "keyint=20:min-keyint=20:open-gop=1:bframes=3"}}),
    "intra refresh": ("libx264", "mp4", {"options": {"x264-params": "keyint=20:intra-refresh=1"}}),
    "mpeg4": ("mpeg4", "avi", {}),
}


@pytest.mark.parametrize("case", NOT_TRUSTED)
def test_untrusted_key_frames_are_not_jumped_to(case: str, tmp_path: Path, watched: Watched) -> None:
    codec, container, settings = NOT_TRUSTED[case]
    data = moving(tmp_path, codec, container, 100, **settings)
    modality = video(max_clips=2)
    expected = by_full_decoding(modality, data)
    np.testing.assert_array_equal(modality.decode(data, container, {}, len(expected)), expected)
    with av.open(io.BytesIO(data)) as opened:
        key_frames = [n for n, packet in enumerate(opened.demux(video=0)) if packet.size and packet.is_keyframe]
    assert len(key_frames) > 3 or case == "intra refresh"
    # Every picture that others may refer to was decoded, from the first one on.
    assert watched.packets > 60


def test_pictures_out_of_order_without_times_are_decoded_from_the_start(
    tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An AVI file states no times of display: FFmpeg guesses those of packets, in the order of the file."""
    data = moving(tmp_path, "libx264", "avi", options=X264)
    for clips in (1, 2, 3):
        modality = video(max_clips=clips)
        frames = modality.decode(data, "avi", {}, clips)
        with monkeypatch.context() as patched:
            patched.setattr(video_frames, "_by_jumps", _never)
            np.testing.assert_array_equal(frames, modality.decode(data, "avi", {}, clips))
    assert watched.fallbacks == 6


def _never(*arguments: Any) -> Any:
    raise video_frames.CannotSeek


def test_the_end_of_a_file_is_that_of_its_last_frame(tmp_path: Path, watched: Watched) -> None:
    data = moving(tmp_path, "libx264", "mp4", options=X264)
    with av.open(io.BytesIO(data)) as container:
        table = video_frames.PacketTable(video_frames.Decoder(container, container.streams.video[0]))
        for packet in container.demux(video=0):
            table.add(packet)
        late = np.array([float(container.duration / av.time_base) + 1.0])
        with pytest.raises(MediaError, match="it is cut off"):
            list(video_frames.frames_at(table, late, RATE))
    assert watched.fallbacks == 0


def test_what_a_wrong_index_gives_is_not_used(
    tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = moving(tmp_path, "libx264", "mp4", options=X264)
    modality = video(max_clips=1)
    expected = by_full_decoding(modality, data)
    seek = video_frames.Decoder.seek
    monkeypatch.setattr(video_frames.Decoder, "seek", lambda decoder, stamp: seek(decoder, stamp * 2))
    np.testing.assert_array_equal(modality.decode(data, "mp4", {}, 1), expected)
    assert watched.fallbacks == 1


def test_a_damaged_frame_before_a_wanted_one_is_found(tmp_path: Path) -> None:
    data = bytearray(moving(tmp_path, "libx264", "mp4", options=X264))
    modality = video(max_clips=1)
    with av.open(io.BytesIO(bytes(data))) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    # The wanted second is in the GOP of packets 140 to 159; its first frame is spoilt.
    position, size = packets[140]
    for offset in range(position + size // 4, position + size, 50):
        data[offset] ^= 0x55
    with pytest.raises(MediaError, match=r"is damaged|cannot be decoded"):
        modality.load(bytes(data), "mp4", {})


def test_one_frame_serves_several_times(watched: Watched) -> None:
    modality = video(num_frames=32)
    data = video_bytes(8)
    expected = by_full_decoding(modality, data)
    np.testing.assert_array_equal(modality.decode(data, "mp4", {}, 1), expected)
    assert watched.fallbacks == 0 and len(np.unique(expected[0].reshape(32, -1), axis=0)) == 8
