"""Audio against transformers' CLAP feature extractor and analytic sines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import CLAP_SHAPE, SMALL_AUDIO, section, sine, sound_bytes
from transformers import ClapAudioConfig, ClapFeatureExtractor

from megatron_anymal.config import ConfigError
from megatron_anymal.modalities import MediaError, build_modality
from megatron_anymal.modalities.audio import AudioModality
from megatron_anymal.modalities.sounds import resample


def audio(**options: Any) -> AudioModality:
    modality = build_modality("audio", section("identity", **{**SMALL_AUDIO, **options}))
    assert isinstance(modality, AudioModality)
    return modality


def test_pieces_equal_claps_own_extractor() -> None:
    modality = build_modality("audio", section("clap", {"depths": [1, 1, 1, 1], "hidden_size": 64}))
    rng = np.random.default_rng(0)
    wave = rng.uniform(-0.5, 0.5, 48000 * 13).astype(np.float32)
    pieces = modality.load(sound_bytes(wave, 48000, subtype="FLOAT"), "wav", {})
    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="pad", frequency_min=50, frequency_max=14000)
    assert pieces.shape == (2, *modality.piece_shape) == (2, 1, 1001, 64)
    for piece, start in zip(pieces, (0, 480000)):
        oracle = extractor(wave[start : start + 480000], sampling_rate=48000, return_tensors="pt")["input_features"]
        torch.testing.assert_close(piece, oracle[0].float(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("fuses", [False, True])
def test_a_clap_folders_own_extractor_is_used(tmp_path: Path, fuses: bool) -> None:
    ClapAudioConfig(**CLAP_SHAPE, enable_fusion=fuses).save_pretrained(tmp_path)
    folder_extractor = ClapFeatureExtractor(
        feature_size=32, sampling_rate=8000, hop_length=128, fft_window_size=256, frequency_max=3000, padding="pad"
    )
    folder_extractor.save_pretrained(tmp_path)
    modality = build_modality("audio", section("clap", path=str(tmp_path), piece_seconds=1.0))
    wave = sine(0.7, 8000)
    pieces = modality.load(sound_bytes(wave, 8000, subtype="FLOAT"), "wav", {})
    oracle = folder_extractor(
        wave,
        sampling_rate=8000,
        max_length=8000,
        truncation="fusion" if fuses else "rand_trunc",
        return_tensors="pt",
    )["input_features"]
    assert pieces.shape == (1, 4 if fuses else 1, 63, 32)
    torch.testing.assert_close(pieces, oracle.float(), rtol=1e-6, atol=1e-4)
    with pytest.raises(ConfigError, match=r"options\.hop_length is fixed by the preprocessor"):
        build_modality("audio", section("clap", path=str(tmp_path), hop_length=99))


def test_small_log_mel_for_the_identity_encoder() -> None:
    modality = audio()
    assert modality.piece_shape == (32, 32)
    data = sound_bytes(sine(2.5, 8000), 8000)
    raw, scaled = modality.load(data, "wav", {}), audio(mel_mean=-40.0, mel_std=40.0).load(data, "wav", {})
    assert raw.shape == (3, 32, 32)
    torch.testing.assert_close(scaled, (raw + 40) / 40)
    # 440 Hz lies in one band, which is the loudest throughout the first window.
    loudest = raw[0, 1:-1].argmax(dim=1)
    assert loudest.unique().numel() == 1


def test_padding_of_the_last_piece() -> None:
    data = sound_bytes(sine(0.5, 8000), 8000)
    silent_end = audio().load(data, "wav", {})[0, 20:]
    repeated = audio(padding="repeatpad").load(data, "wav", {})[0, 20:]
    assert silent_end.max() < -60 < 0 < repeated.max()


@pytest.mark.parametrize(("rate", "target"), [(44100, 48000), (8000, 48000), (48000, 8000), (22050, 16000)])
def test_resampling_keeps_a_sine_in_place(rate: int, target: int) -> None:
    out = resample([sine(1.5, rate)], rate, target)
    expected = sine(1.5, target)
    assert out.shape == expected.shape and out.dtype == np.float32
    inner = slice(target // 10, -target // 10)
    np.testing.assert_allclose(out[inner], expected[inner], atol=2e-3)


def test_resampling_removes_what_would_alias() -> None:
    assert np.abs(resample([sine(1.0, 48000, 9000.0)], 48000, 8000)[500:-500]).max() < 0.01


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_formats_and_stereo(kind: str) -> None:
    wave = sine(1.0, 16000)
    stereo = np.stack([wave, np.zeros_like(wave)], axis=1)
    data = sound_bytes(stereo, 16000, kind)
    assert audio().probe(data, kind.lower(), {}) == (pytest.approx(1.0, abs=0.1), 16000.0)
    heard = audio().waveform(data, 1)
    np.testing.assert_allclose(np.abs(heard[1000:7000]).max(), 0.25, atol=0.03)


def test_opus_in_ogg() -> None:
    data = sound_bytes(sine(1.0, 48000), 48000, "OGG", subtype="OPUS")
    assert len(audio().load(data, "opus", {})) == 1


def test_count_and_load_agree() -> None:
    modality = audio(max_pieces=3)
    for samples in (1, 7999, 8000, 8001, 16000, 16001, 24001, 80000):
        for rate in (8000, 11025):
            data = sound_bytes(sine(1.0, 1)[:1].repeat(samples), rate)
            count = modality.count_pieces(np.array([modality.probe(data, "wav", {})]))
            assert count[0] == min(3, -(-samples // rate)) and count.dtype == np.int64
            assert len(modality.load(data, "wav", {})) == count[0]


def test_bad_files_are_refused() -> None:
    modality = audio()
    flac = sound_bytes(np.random.default_rng(0).uniform(-1, 1, 16000), 8000, "FLAC")
    broken = np.zeros(8000, dtype=np.float32)
    broken[17] = np.nan
    for data, reason in [
        (b"", "empty"),
        (b"no sound" * 100, "cannot be decoded"),
        (sound_bytes(np.zeros(0), 8000), "0 samples"),
        (flac[: len(flac) // 2], r"cut off|cannot be decoded"),
        (sound_bytes(broken, 8000, subtype="FLOAT"), "sample 17 is not finite"),
    ]:
        with pytest.raises(MediaError, match=reason):
            modality.load(data, "wav", {})


def test_an_absurd_sampling_rate_is_refused() -> None:
    data = bytearray(sound_bytes(sine(1.0, 8000), 8000))
    data[24:28] = (2**31 - 1).to_bytes(4, "little")
    with pytest.raises(MediaError, match="sampling rate of 2147483647 Hz"):
        audio().load(bytes(data), "wav", {})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"piece_seconds": 0}, "piece_seconds"),
        ({"padding": "mirror"}, "padding"),
        ({"piece_seconds": 0.01}, "piece_seconds"),
        ({"mel_std": 0.0}, "mel_std"),
        ({"sample_rate": 8000}, "Did you mean 'sampling_rate'"),
    ],
)
def test_impossible_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        audio(**options)


def test_mel_bands_must_be_the_encoders() -> None:
    with pytest.raises(ConfigError, match="16 bands but the encoder takes 32"):
        build_modality("audio", section("clap", CLAP_SHAPE, n_mels=16))
