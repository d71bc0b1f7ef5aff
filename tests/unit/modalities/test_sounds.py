"""Which sound files are read, the durations found, and the files refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import CLAP_SHAPE, SMALL_AUDIO, container_sound, section, sine, sound_bytes, video_bytes
from transformers import ClapAudioConfig, ClapFeatureExtractor

from megatron_anymal.config import ConfigError, LimitsConfig
from megatron_anymal.modalities import MediaError, build_modality
from megatron_anymal.modalities.audio import AudioModality
from megatron_anymal.modalities.sounds import resample


def audio(limits: LimitsConfig | None = None, **options: Any) -> AudioModality:
    modality = build_modality("audio", section("identity", **{**SMALL_AUDIO, **options}), limits or LimitsConfig())
    assert isinstance(modality, AudioModality)
    return modality


def seconds(data: bytes, limits: LimitsConfig | None = None) -> float:
    return audio().probe(data, "", {}, limits or LimitsConfig())[0]


def loudness(data: bytes, pieces: int) -> np.ndarray:
    """Root mean square of each tenth of a second."""
    wave = audio(max_pieces=100).waveform(data, pieces)
    tenths = wave[: len(wave) // 800 * 800].reshape(-1, 800)
    return np.sqrt((tenths**2).mean(axis=1))


def noise_then_silence(noisy: float, silent: float, rate: int = 44100) -> np.ndarray:
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, round(noisy * rate))
    return np.concatenate([noise, np.zeros(round(silent * rate))]).astype(np.float32)


def mp3_frames(data: bytes) -> list[bytes]:
    """The frames of an MPEG 1 layer 3 file."""
    frames, at = [], 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[data[at + 2] >> 4]
        length = 144_000 * kbps // (44100, 48000, 32000)[data[at + 2] >> 2 & 3] + (data[at + 2] >> 1 & 1)
        frames.append(data[at : at + length])
        at += length
    return frames


def vbr_mp3(wave: np.ndarray) -> bytes:
    return sound_bytes(wave, 44100, "MP3", bitrate_mode="VARIABLE", compression_level=0.3)


def test_an_mp3_without_a_header_that_counts_its_frames_is_decoded_to_the_end() -> None:
    whole = vbr_mp3(noise_then_silence(2, 6))
    frames = mp3_frames(whole)
    assert len({len(frame) for frame in frames}) > 3 and b"Xing" in frames[0]
    without = b"".join(frames[1:])
    assert seconds(whole) == pytest.approx(8.0, abs=0.01)
    # One frame lasts 0.026 s; without the header the encoder delay counts as sound.
    assert seconds(without) == pytest.approx((len(frames) - 1) * 1152 / 44100, abs=0.001)
    heard = loudness(without, 9)
    assert (heard[1:19] > 0.15).all() and (heard[22:] < 0.01).all() and len(heard) >= 80


def test_an_mp3_written_behind_another_is_heard_too() -> None:
    first, second = vbr_mp3(noise_then_silence(1, 2)), vbr_mp3(noise_then_silence(1, 2))
    assert seconds(first + second) == pytest.approx(6.0, abs=0.2)
    heard = loudness(first + second, 7)
    assert (heard[1:9] > 0.15).all() and (heard[13:29] < 0.01).all() and (heard[33:39] > 0.15).all()


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_a_chained_ogg_is_read_on(subtype: str) -> None:
    loud = sound_bytes(noise_then_silence(3, 0, 48000), 48000, "OGG", subtype=subtype)
    silent = sound_bytes(noise_then_silence(0, 2, 48000), 48000, "OGG", subtype=subtype)
    assert seconds(loud) == pytest.approx(3.0, abs=0.01)
    assert seconds(loud + silent + loud) == pytest.approx(8.0, abs=0.03)
    heard = loudness(loud + silent + loud, 8)
    assert (heard[1:29] > 0.15).all() and (heard[31:49] < 0.01).all() and (heard[51:79] > 0.15).all()
    other = sound_bytes(sine(1, 24000), 24000, "OGG", subtype="VORBIS")
    if subtype == "VORBIS":
        with pytest.raises(MediaError, match=r"has several sampling rates \(\[24000, 48000\] Hz\)"):
            seconds(loud + other)


def test_ogg_streams_side_by_side_are_refused() -> None:
    first, second = (sound_bytes(sine(1, 48000), 48000, "OGG", subtype="VORBIS") for _ in range(2))
    begin = first.index(b"OggS", 4)
    with pytest.raises(MediaError, match="several multiplexed streams"):
        seconds(first[:begin] + second[: second.index(b"OggS", 4)] + first[begin:])


def test_a_flac_that_states_no_length_is_counted() -> None:
    data = bytearray(sound_bytes(noise_then_silence(1.5, 0, 8000), 8000, "FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    assert seconds(bytes(data)) == 1.5
    assert len(audio().load(bytes(data), "flac", {})) == 2


@pytest.mark.parametrize(
    ("kind", "endian"), [("WAV", "FILE"), ("WAV", "BIG"), ("WAVEX", "FILE"), ("RF64", "FILE"), ("AIFF", "FILE")]
)
def test_cut_files_are_refused_in_every_format(kind: str, endian: str) -> None:
    data = sound_bytes(sine(1.0, 8000), 8000, kind, subtype="PCM_16", endian=endian)
    assert seconds(data) == 1.0
    for cut in (len(data) // 2, len(data) - 2):
        with pytest.raises(MediaError, match=r"states 160\d\d bytes of audio but contains \d+: it is cut off"):
            audio().probe(data[:cut], "wav", {})


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFF000])
def test_a_streamed_wav_goes_on_to_its_end(size: int) -> None:
    data = bytearray(sound_bytes(sine(1.5, 8000), 8000))
    data[4:8] = data[40:44] = size.to_bytes(4, "little")
    assert seconds(bytes(data)) == 1.5
    assert len(audio().load(bytes(data), "wav", {})) == 2


def test_a_wav_whose_header_was_never_completed_is_refused() -> None:
    data = bytearray(sound_bytes(sine(1.5, 8000), 8000))
    data[40:44] = bytes(4)
    with pytest.raises(MediaError, match="states 0 bytes of audio, but 24000 bytes follow"):
        seconds(bytes(data))


def test_other_formats_of_libsndfile_are_refused() -> None:
    for kind in ("AU", "CAF", "W64"):
        with pytest.raises(MediaError, match="in an unsupported format") as caught:
            seconds(sound_bytes(sine(0.5, 8000), 8000, kind))
        assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("ipod", "aac"),
        ("mp4", "aac"),
        ("adts", "aac"),
        ("webm", "libopus"),
        ("matroska", "libmp3lame"),
        ("mov", "alac"),
    ],
)
def test_containers_and_aac(container: str, codec: str) -> None:
    wave = np.concatenate([sine(1.0, 48000), np.zeros(48000, np.float32), sine(1.0, 48000)])
    layout = "stereo" if codec == "libmp3lame" else "mono"
    data = container_sound(wave, container, codec, layout=layout)
    # Raw AAC does not state the encoder delay; one of its frames lasts 0.02 s.
    assert seconds(data) == pytest.approx(3.0, abs=0.06)
    heard = loudness(data, 3)
    expected = np.repeat([0.5 / 2**0.5, 0.0, 0.5 / 2**0.5], 10)
    inner = np.r_[1:9, 11:19, 21:29]
    np.testing.assert_allclose(heard[inner], expected[inner], atol=0.02)


def test_a_videos_sound_track() -> None:
    data = video_bytes(8, container="matroska", sound_seconds=2.0)
    assert seconds(data) == pytest.approx(2.0, abs=0.05)
    with pytest.raises(MediaError, match="has no audio stream"):
        seconds(video_bytes(8))


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("webm", "libopus")])
def test_cut_containers_are_refused(container: str, codec: str) -> None:
    data = container_sound(np.random.default_rng(0).uniform(-1, 1, 48000 * 3).astype(np.float32), container, codec)
    with pytest.raises(MediaError, match="cut off"):
        seconds(data[: len(data) // 2])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_cut_ogg_files_are_refused_wherever_they_are_cut(subtype: str) -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 72_000).astype(np.float32)
    whole = sound_bytes(wave, 48000, "OGG", subtype=subtype)
    last_page = whole.rindex(b"OggS")
    for cut in (len(whole) // 2, last_page, last_page + 40, len(whole) - 1):
        with pytest.raises(MediaError, match="cut off"):
            seconds(whole[:cut])
    # The first of two joined files, cut at a page.
    with pytest.raises(MediaError, match="cut off"):
        seconds(whole[:last_page] + whole)
    assert seconds(whole + whole) == pytest.approx(3.0)


def test_blocks_of_any_length_resample_to_the_same() -> None:
    wave = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    whole = resample([wave], 44100, 48000)
    for step in (1000, 4096, 33_333):
        parts = resample([wave[at : at + step] for at in range(0, len(wave), step)], 44100, 48000)
        np.testing.assert_array_equal(parts, whole)


def test_limits_are_named_before_and_while_decoding() -> None:
    long = sound_bytes(noise_then_silence(3, 0, 8000), 8000)
    mp3 = b"".join(mp3_frames(vbr_mp3(noise_then_silence(1, 4)))[1:])
    for data in (long, mp3, container_sound(sine(3.0, 48000), "mp4", "aac")):
        with pytest.raises(MediaError, match=r"lasts \d\.\d s or more, above data.limits.max_seconds=2.5; cut it or"):
            seconds(data, LimitsConfig(max_seconds=2.5))
        assert seconds(data, LimitsConfig(max_seconds=6.0)) > 2.5
        with pytest.raises(
            MediaError, match=r"samples \(\d+ x 1 channels\) or more, above data.limits.max_values=9999"
        ):
            seconds(data, LimitsConfig(max_values=9999))
    with pytest.raises(MediaError, match="max_seconds=2"):
        audio(LimitsConfig(max_seconds=2.0)).load(long, "wav", {})


@pytest.mark.parametrize(
    ("stated", "given", "used"),
    [("repeatpad", None, "repeatpad"), ("repeat", None, "repeat"), ("repeatpad", "pad", "pad")],
)
def test_a_clap_folders_padding_and_length_are_the_defaults(
    tmp_path: Path, stated: str, given: str | None, used: str
) -> None:
    ClapAudioConfig(**CLAP_SHAPE, enable_fusion=False).save_pretrained(tmp_path)
    folder = ClapFeatureExtractor(
        feature_size=32,
        sampling_rate=8000,
        hop_length=128,
        fft_window_size=256,
        frequency_max=3000,
        padding=stated,
        truncation="rand_trunc",
        max_length_s=2,
    )
    folder.save_pretrained(tmp_path)
    options = {} if given is None else {"padding": given}
    modality = build_modality("audio", section("clap", path=str(tmp_path), **options))
    wave = sine(0.7, 8000)
    pieces = modality.load(sound_bytes(wave, 8000, subtype="FLOAT"), "wav", {})
    oracle = folder(wave, sampling_rate=8000, padding=used, return_tensors="pt")["input_features"]
    assert pieces.shape == (1, 1, 126, 32)
    torch.testing.assert_close(pieces, oracle.float(), rtol=1e-6, atol=1e-4)


def test_an_unknown_padding_of_a_folder_is_refused(tmp_path: Path) -> None:
    ClapAudioConfig(**CLAP_SHAPE).save_pretrained(tmp_path)
    ClapFeatureExtractor(feature_size=32, padding="mirror").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="padding='mirror'"):
        build_modality("audio", section("clap", path=str(tmp_path)))


def test_a_wav_with_other_chunks_around_its_sound() -> None:
    data = sound_bytes(sine(1.0, 8000), 8000)
    note = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    grown = b"RIFF" + struct.pack("<I", len(data) - 8 + 2 * len(note)) + data[8:36] + note + data[36:] + note
    assert seconds(grown) == 1.0
    with pytest.raises(MediaError, match="cut off"):
        seconds(grown[: len(data)])
