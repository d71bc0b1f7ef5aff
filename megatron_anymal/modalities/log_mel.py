"""Log-mel spectrograms as transformers' ClapFeatureExtractor computes them, for many frames at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

# Frames per transform: their spectra stay in the processor's cache.
_FRAMES = 64
# transformers' spectrogram(): the smallest power, -100 dB.
_FLOOR = 1e-10


class LogMel:
    """Pads a window of audio and computes its log-mel spectrogram in dB.

    The extractor's own loop takes one frame after the other and is four times as slow. Fourier transforms are computed
    in float64, since the floor lies 150 dB below the power of a full-scale sine; the powers are added up in float32,
    which has no cancellation. The result is within 1e-4 dB of the extractor's.

    Args:
        extractor: a ClapFeatureExtractor, whose filters and sizes are used.
        fuses: use the filters of models that fuse features of long recordings (HTK's mel scale), as the extractor does
            for truncation="fusion"; otherwise those of truncation="rand_trunc" (Slaney's).
        padding: "pad" with zeros, or "repeatpad" or "repeat" with the window's own content.
        samples: length of a window.
    """

    def __init__(self, extractor: Any, fuses: bool, padding: str, samples: int) -> None:
        from transformers.audio_utils import window_function

        filters = extractor.mel_filters if fuses else extractor.mel_filters_slaney
        # Bins above the highest band contribute nothing.
        self._bins = int(np.flatnonzero(filters.any(axis=1)).max(initial=-1)) + 1
        self._filters = filters[: self._bins].astype(np.float32)
        self._window = window_function(extractor.fft_window_size, "hann").astype(np.float64)
        self._hop, self._padding, self._samples = extractor.hop_length, padding, samples

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """The spectrogram of [n] float32, 1 <= n <= `samples`: [frames, mels] float32."""
        frames = np.lib.stride_tricks.sliding_window_view(self._padded(wave), len(self._window))[:: self._hop]
        mel = np.empty((len(frames), self._filters.shape[1]), dtype=np.float32)
        windowed = np.empty((_FRAMES, len(self._window)), dtype=np.float64)
        for first in range(0, len(frames), _FRAMES):
            some = frames[first : first + _FRAMES]
            spectra = np.fft.rfft(np.multiply(some, self._window, out=windowed[: len(some)]))[:, : self._bins]
            power = (spectra.real**2 + spectra.imag**2).astype(np.float32)
            np.matmul(power, self._filters, out=mel[first : first + _FRAMES])
        np.maximum(mel, np.float32(_FLOOR), out=mel)
        np.log10(mel, out=mel)
        mel *= 10
        return mel

    def _padded(self, wave: np.ndarray) -> np.ndarray:
        """Extend a window to `samples` as ClapFeatureExtractor._get_input_mel does, and reflect half a frame around it:
        [samples + half + half]."""
        half, times = len(self._window) // 2, self._samples // len(wave)
        padded = np.empty(self._samples + 2 * half, dtype=np.float32)
        inner = padded[half : half + self._samples]
        if self._padding == "repeat" and len(wave) < self._samples:
            wave = np.tile(wave, times + 1)[: self._samples]
        elif self._padding == "repeatpad" and times > 1:
            wave = np.tile(wave, times)
        inner[: len(wave)], inner[len(wave) :] = wave, 0
        # A window is at least as long as a frame.
        padded[:half], padded[half + self._samples :] = inner[half:0:-1], inner[-2 : -half - 2 : -1]
        return padded
