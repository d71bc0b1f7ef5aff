"""Video: the frames that are taken, identified by the grey values written into them."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
import torch
from media import CLIP_SHAPE, VIDEOMAE_SHAPE, container_sound, section, sine, sound_bytes, video_bytes, with_matrix
from PIL import Image, ImageOps

from megatron_anymal.config import ConfigError, LimitsConfig
from megatron_anymal.modalities import MediaError, Modality, build_modality


def video(**options: Any) -> Modality:
    """A video modality without normalisation: frames keep their grey values."""
    plain = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "num_frames": 4, "clip_seconds": 1.0}
    return build_modality("video", section("clip", CLIP_SHAPE, **{**plain, **options}))


def frame_numbers(clips: torch.Tensor) -> list[list[int]]:
    """The number (mod 36) of each frame, read from its grey value; all pixels of a frame are equal."""
    assert (clips.flatten(2).amax(2) - clips.flatten(2).amin(2)).max() < 0.03
    return ((clips.flatten(2).mean(2) * 255 - 20) / 6).round().int().tolist()


def test_frames_at_the_centres_of_equal_intervals() -> None:
    data = video_bytes(16)
    assert video().probe(data, "mp4", {}) == (2.0, 8.0)
    # Times 1/8, 3/8, 5/8, 7/8 of each second; a frame lasts 1/8 s.
    assert frame_numbers(video().load(data, "mp4", {})) == [[1, 3, 5, 7], [9, 11, 13, 15]]


def test_the_last_clip_is_sampled_within_what_is_there() -> None:
    # 1.5 s: the last clip lasts 0.5 s and has frames 8..11, one each.
    assert frame_numbers(video().load(video_bytes(12), "mp4", {})) == [[1, 3, 5, 7], [8, 9, 10, 11]]
    # A remainder of one frame belongs to the previous clip: 9 frames over 1.125 s.
    assert frame_numbers(video().load(video_bytes(9), "mp4", {})) == [[1, 3, 5, 7]]
    assert frame_numbers(video().load(video_bytes(1), "mp4", {})) == [[0, 0, 0, 0]]


def test_capped_clips_are_spread_over_the_video() -> None:
    clips = video(max_clips=3).load(video_bytes(40), "mp4", {})
    assert frame_numbers(clips) == [[1, 3, 5, 7], [17, 19, 21, 23], [33, 35, 1, 3]]
    assert frame_numbers(video(max_clips=1).load(video_bytes(40), "mp4", {})) == [[17, 19, 21, 23]]


def test_far_jumps_seek_and_find_the_same_frames() -> None:
    # 60 s: one-second clips at 0, 29.5 and 59 s, with over 10 s of undecoded video between them.
    numbers = frame_numbers(video(max_clips=3).load(video_bytes(480), "mp4", {}))
    assert numbers == [[(start + n) % 36 for n in (1, 3, 5, 7)] for start in (0, 236, 472)]


def test_count_and_load_agree() -> None:
    modality = video(max_clips=4)
    for frames in (1, 7, 8, 9, 10, 16, 17, 31, 33, 34, 60):
        data = video_bytes(frames)
        size = modality.probe(data, "mp4", {})
        count = modality.count_pieces(np.array([size]))
        assert count.dtype == np.int64 and len(modality.load(data, "mp4", {})) == count[0]


@pytest.mark.parametrize(("container", "codec"), [("webm", "vp9"), ("matroska", "libx264"), ("avi", "mpeg4")])
def test_other_containers(container: str, codec: str) -> None:
    data = video_bytes(16, container=container, codec=codec)
    assert video().probe(data, container, {})[0] == pytest.approx(2.0, abs=0.01)
    assert frame_numbers(video().load(data, container, {})) == [[1, 3, 5, 7], [9, 11, 13, 15]]


def test_longer_sound_does_not_lengthen_the_video() -> None:
    data = video_bytes(8, container="matroska", sound_seconds=3.0)
    assert video().probe(data, "mkv", {})[0] == pytest.approx(1.0, abs=0.01)
    assert len(video().load(data, "mkv", {})) == 1


def one_picture_video(
    picture: np.ndarray, container: str = "mp4", codec: str = "libx264", pixels: str = "yuv420p", frames: int = 8
) -> bytes:
    """A video at 8 frames per second that shows one picture, RGB or RGBA."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream(codec, rate=8)
        track.height, track.width = picture.shape[:2]
        track.pix_fmt = pixels
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            output.mux(track.encode(frame.reformat(format=pixels)))
        output.mux(track.encode(None))
    return stream.getvalue()


def test_a_phones_display_matrix_turns_the_frames() -> None:
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:32] = 255
    frame = video().load(with_matrix(one_picture_video(picture), (0, 1, -1, 0)), "mp4", {})[0, 0]
    # After a clockwise turn the bright upper half is on the right.
    assert frame[:, :, :12].max() < 0.1 and frame[:, :, 20:].min() > 0.9


def quarters() -> np.ndarray:
    """A frame with four different quarters: 40, 90 above 140, 190."""
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:32, :32], picture[:32, 32:], picture[32:, :32], picture[32:, 32:] = 40, 90, 140, 190
    return picture


@pytest.mark.parametrize(
    ("linear", "orientation"),
    [
        ((1, 0, 0, 1), 1),
        ((-1, 0, 0, 1), 2),
        ((-1, 0, 0, -1), 3),
        ((1, 0, 0, -1), 4),
        ((0, 1, 1, 0), 5),
        ((0, 1, -1, 0), 6),
        ((0, -1, -1, 0), 7),
        ((0, -1, 1, 0), 8),
    ],
)
def test_display_matrices_turn_and_mirror(linear: tuple[int, int, int, int], orientation: int) -> None:
    data = with_matrix(one_picture_video(quarters()), linear)
    stored = Image.fromarray(quarters())
    stored.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(stored))[8::16, 8::16, 0]
    pixels = (video().load(data, "mp4", {})[0, 0, 0] * 255).numpy()[4::8, 4::8]
    np.testing.assert_allclose(pixels, expected, atol=6)


def test_other_turns_are_refused() -> None:
    data = one_picture_video(quarters())
    with pytest.raises(MediaError, match="rotation that is not a multiple of 90 degrees"):
        video().load(with_matrix(data, (0.8, 0.6, -0.6, 0.8)), "mp4", {})


@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [
        ("webm", "libvpx-vp9", "yuva420p"),
        ("mov", "qtrle", "argb"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("mov", "png", "rgba"),
    ],
)
def test_transparency_is_laid_over_white(container: str, codec: str, pixels: str) -> None:
    picture = np.zeros((64, 64, 4), dtype=np.uint8)
    picture[..., 0] = 200
    picture[:32, :, 3] = 255
    data = one_picture_video(picture, container, codec, pixels, frames=24)
    clips = video().load(data, container, {})
    # The upper half is opaque red, the lower half transparent.
    for clip in clips.reshape(-1, 3, 32, 32):
        assert clip[0, :14].mean() == pytest.approx(200 / 255, abs=0.03) and clip[1:, :14].max() < 0.1
        assert clip[:, 18:].min() > 0.97
    assert len(clips) == 3


def test_a_header_that_states_too_little_loses_no_frames() -> None:
    """Variable frame rate: 13 frames up to 3.9 s under a header that states 1.3 s."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as output:
        track = output.add_stream("libx264", rate=10)
        track.width, track.height, track.codec_context.time_base = 64, 48, Fraction(1, 10)
        for number in range(13):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 + 6 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 3 * number, Fraction(1, 10)
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
    whole = stream.getvalue()
    # The encoder's duration of the last frame differs between versions of PyAV.
    length = video().probe(whole, "mp4", {})[0]
    assert length in (pytest.approx(3.7), pytest.approx(3.9))
    short = bytearray(whole)
    for box, at in (b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24):
        offset = whole.index(box) + at
        stated = struct.unpack(">I", whole[offset : offset + 4])[0]
        short[offset : offset + 4] = struct.pack(">I", round(stated * 1.3 / 3.7))
    with av.open(io.BytesIO(bytes(short))) as container:
        track = container.streams.video[0]
        assert float(track.duration * track.time_base) == pytest.approx(1.3, abs=0.01)
    assert video().probe(bytes(short), "mp4", {})[0] == length
    # Frame n is shown from 0.3 n s; frames are taken at 1/8, 3/8 ... of each second.
    expected = [[int((second + offset / 8) / 0.3) for offset in (1, 3, 5, 7)] for second in range(3)]
    assert frame_numbers(video().load(bytes(short), "mp4", {}))[:3] == expected


def test_limits_of_videos_are_named() -> None:
    data = video_bytes(40)
    with pytest.raises(MediaError, match=r"frames of 3072 pixels \(64 x 48\), above data.limits.max_frame_pixels=3071"):
        video().probe(data, "mp4", {}, LimitsConfig(max_frame_pixels=3071))
    for container, codec in (("mp4", "libx264"), ("webm", "vp9"), ("avi", "mpeg4")):
        made = video_bytes(40, container=container, codec=codec)
        assert video().probe(made, container, {}, LimitsConfig(max_frame_pixels=3072, max_seconds=5.1))[0] > 4.9
        with pytest.raises(MediaError, match=r"lasts 4\.\d s or more, above data.limits.max_seconds=4.1; cut it or"):
            video().probe(made, container, {}, LimitsConfig(max_seconds=4.1))
    modality = build_modality("video", section("clip", CLIP_SHAPE), LimitsConfig(max_seconds=4.1))
    with pytest.raises(MediaError, match="max_seconds"):
        modality.load(data, "mp4", {})


def test_a_recordings_cover_is_no_video() -> None:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=48000, layout="mono")
        cover = output.add_stream("mjpeg", rate=1, width=64, height=64, pix_fmt="yuvj420p")
        cover.disposition = 1 << 10
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        output.mux(sound.encode(frame))
        output.mux(cover.encode(av.VideoFrame.from_ndarray(quarters(), format="rgb24")))
        for track in (sound, cover):
            output.mux(track.encode(None))
    with pytest.raises(MediaError, match="no video stream"):
        video().probe(stream.getvalue(), "mp4", {})


def test_playlists_open_nothing() -> None:
    text = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///tmp/other.ts\n#EXT-X-ENDLIST\n"
    for data in (text, b"ffconcat version 1.0\nfile other.mp4\n"):
        with pytest.raises(MediaError, match="in an unsupported format"):
            video().probe(data, "mp4", {})


def test_videomae_states_the_number_of_frames() -> None:
    modality = build_modality("video", section("videomae", VIDEOMAE_SHAPE))
    assert modality.piece_shape == (4, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"options\.num_frames=5.*takes 4"):
        build_modality("video", section("videomae", VIDEOMAE_SHAPE, num_frames=5))


def test_load_is_deterministic_and_float32() -> None:
    data = video_bytes(20)
    first, second = video().load(data, "mp4", {}), video().load(data, "mp4", {})
    assert torch.equal(first, second) and first.dtype == torch.float32


@pytest.mark.parametrize("movflags", ["", "faststart"])
def test_truncated_videos_are_refused(movflags: str) -> None:
    data = video_bytes(40, **({"movflags": movflags} if movflags else {}))
    modality = video()
    assert len(modality.load(data, "mp4", {})) == 5
    for share in (0.1, 0.5, 0.8, 0.95):
        with pytest.raises(MediaError, match="cut off"):
            modality.load(data[: int(len(data) * share)], "mp4", {})


def test_a_cut_between_two_frames_is_found() -> None:
    data = video_bytes(40, movflags="faststart")
    with av.open(io.BytesIO(data)) as container:
        cut = [packet.pos for packet in container.demux(video=0) if packet.size]
    for frame in (30, 37, 39):
        with pytest.raises(MediaError, match=rf"has {cut[frame]} bytes of the {len(data)} .*: it is cut off"):
            video().probe(data[: cut[frame]], "mp4", {})


@pytest.mark.parametrize("container", ["webm", "matroska"])
def test_cut_off_containers_that_state_no_stream_duration(container: str) -> None:
    data = video_bytes(40, container=container, codec="vp9")
    with pytest.raises(MediaError, match="cut off"):
        video().probe(data[: len(data) // 2], container, {})


def test_damaged_frames_are_refused() -> None:
    rng = np.random.default_rng(0)
    data = bytearray(video_bytes(16, noise=rng))
    assert len(video().load(bytes(data), "mp4", {})) == 2
    for position in rng.integers(len(data) // 10, len(data) * 8 // 10, size=40):
        data[position] ^= 0x55
    with pytest.raises(MediaError, match=r"is damaged|cannot be decoded"):
        video().load(bytes(data), "mp4", {})


def test_unreadable_metadata_does_not_matter() -> None:
    data = video_bytes(8).replace(b"VideoHandler", b"Video\xfe\xff\xfeandl")
    assert len(video().load(data, "mp4", {})) == 1


def test_files_that_are_no_video() -> None:
    for data, reason in [(b"", "empty"), (b"no video at all" * 50, "cannot be decoded")]:
        with pytest.raises(MediaError, match=reason):
            video().probe(data, "mp4", {})
    with pytest.raises(MediaError, match="in an unsupported format"):
        video().probe(sound_bytes(sine(1, 8000), 8000), "mp4", {})
    with pytest.raises(MediaError, match="no video stream"):
        video().probe(container_sound(sine(1, 48000), "mp4", "aac"), "mp4", {})
