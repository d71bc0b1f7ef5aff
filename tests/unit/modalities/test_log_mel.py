"""Log-mel spectrograms against transformers' own extractor, and resampling against an infinitely long filter."""

from __future__ import annotations

import numpy as np
import pytest
from media import sine
from transformers import ClapFeatureExtractor

from megatron_anymal.modalities.log_mel import LogMel
from megatron_anymal.modalities.sounds import resample

RATE = 48000
# In dB.
TOLERANCE = 1e-4


def waves() -> dict[str, np.ndarray]:
    """Five seconds each, of very different dynamic range."""
    rng, time = np.random.default_rng(0), np.arange(5 * RATE) / RATE
    noise = rng.standard_normal(len(time))
    speech = np.cumsum(noise) * np.abs(np.sin(2 * np.pi * 3 * time))
    click = np.zeros(len(time))
    click[1000] = 1.0
    made = {
        "noise": 0.3 * noise / np.abs(noise).max(),
        # Zeros of its spectrum lie 150 dB below its peak.
        "tone at a bin": 0.9 * np.sin(2 * np.pi * 40 * RATE / 1024 * time),
        "sweep": 0.5 * np.sin(2 * np.pi * (100 * time + 1200 * time**2)),
        "speech": 0.8 * speech / np.abs(speech).max(),
        "16 bits": np.round(0.5 * np.sin(2 * np.pi * 440 * time) * 32767) / 32768,
        "faint": 1e-4 * noise / np.abs(noise).max(),
        "silence": np.zeros(len(time)),
        "click": click,
        "loud": 100 * noise,
    }
    return {name: wave.astype(np.float32) for name, wave in made.items()}


@pytest.mark.parametrize("padding", ["pad", "repeatpad", "repeat"])
@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
def test_spectrograms_are_claps(padding: str, truncation: str) -> None:
    extractor = ClapFeatureExtractor(frequency_min=50, frequency_max=14000)
    log_mel = LogMel(extractor, truncation == "fusion", padding, 3 * RATE)
    for name, wave in waves().items():
        # Whole, shorter than half, shorter than a frame, and a single sample.
        for length in (3 * RATE, 2 * RATE, RATE + 1, 700, 1):
            given = wave[500 : 500 + length]
            expected = extractor(
                given, truncation=truncation, padding=padding, max_length=3 * RATE, sampling_rate=RATE
            )["input_features"][0]
            spectrogram = log_mel(given)
            assert spectrogram.dtype == np.float32 and spectrogram.shape == expected[0].shape
            for channel in expected:
                np.testing.assert_allclose(spectrogram, channel, rtol=0, atol=TOLERANCE, err_msg=f"{name}, {length}")


@pytest.mark.parametrize(
    ("window", "hop", "rate", "mels", "low", "high"),
    [(1024, 480, 48000, 64, 0, 14000), (512, 256, 8000, 32, 50, 4000), (400, 160, 16000, 80, 20, 7600)],
)
def test_other_sizes(window: int, hop: int, rate: int, mels: int, low: int, high: int) -> None:
    extractor = ClapFeatureExtractor(
        feature_size=mels,
        sampling_rate=rate,
        hop_length=hop,
        fft_window_size=window,
        frequency_min=low,
        frequency_max=high,
    )
    wave = waves()["sweep"][:rate]
    for truncation in ("fusion", "rand_trunc"):
        expected = extractor(wave, truncation=truncation, padding="pad", max_length=rate, sampling_rate=rate)
        spectrogram = LogMel(extractor, truncation == "fusion", "pad", rate)(wave)
        np.testing.assert_allclose(spectrogram, expected["input_features"][0][0], rtol=0, atol=TOLERANCE)


def ideal(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Band-limited interpolation of a periodic signal: a filter of infinite length."""
    spectrum, count = np.fft.rfft(wave), len(wave) * target // rate
    kept = np.zeros(count // 2 + 1, dtype=complex)
    kept[: len(spectrum)] = spectrum[: len(kept)]
    return np.fft.irfft(kept, count) * (count / len(wave))


def band(rate: int, low: float, high: float) -> np.ndarray:
    """Two seconds of noise between two frequencies in Hz, periodic."""
    frequencies = np.fft.rfftfreq(2 * rate, 1 / rate)
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(2 * rate))
    spectrum[(frequencies < low) | (frequencies > high)] = 0
    wave = np.fft.irfft(spectrum, 2 * rate)
    return wave / np.abs(wave).max()


def decibels(difference: np.ndarray, wave: np.ndarray) -> float:
    """Power of a difference, without the ends, relative to a signal."""
    inner = difference[len(difference) // 4 : -len(difference) // 4]
    return 10 * float(np.log10(np.mean(inner**2) / np.mean(wave**2)))


@pytest.mark.parametrize(
    ("rate", "target"),
    [(44100, 48000), (48000, 44100), (22050, 48000), (8000, 48000), (48000, 16000), (96000, 48000), (44100, 16000)],
)
def test_resampling_against_an_infinitely_long_filter(rate: int, target: int) -> None:
    half = min(rate, target) / 2
    passed = band(rate, 0, 0.9 * half)
    resampled = resample([passed.astype(np.float32)], rate, target)
    assert decibels(resampled - ideal(passed, rate, target), passed) < -70
    if target < rate:
        removed = band(rate, 1.05 * half, min(1.9 * half, rate / 2))
        assert decibels(resample([removed.astype(np.float32)], rate, target), removed) < -130


def test_the_ends_of_a_recording_stay() -> None:
    wave = sine(0.01, 44100, 1000.0) + np.float32(0.25)
    resampled = resample([wave], 44100, 48000)
    assert len(resampled) == round(len(wave) * 48000 / 44100)
    # A recording is surrounded by silence; half a millisecond inside, the filter no longer sees it.
    inner = slice(24, -24)
    np.testing.assert_allclose(resampled[inner], (sine(0.01, 48000, 1000.0) + np.float32(0.25))[inner], atol=0.02)
    assert len(resample([wave[:1]], 44100, 48000)) == 1 and len(resample([], 44100, 48000)) == 0
