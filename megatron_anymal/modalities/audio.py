"""Audio: fixed-length windows as log-mel spectrograms (AnyMAL section 3.1) with CLAP's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megatron_anymal.config import DEFAULT_LIMITS, ConfigError, EncoderConfig, LimitsConfig, ModalityConfig
from megatron_anymal.modalities.architecture import preprocessor, transformers_config
from megatron_anymal.modalities.base import Modality, count_in_time, require_above
from megatron_anymal.modalities.log_mel import LogMel
from megatron_anymal.modalities.registry import register
from megatron_anymal.modalities.sounds import opened, resample, to_length

# Options that are determined by the preprocessor of a CLAP folder.
FIXED_BY_FOLDER = ("sampling_rate", "n_mels", "hop_length", "fft_window_size", "frequency_min", "frequency_max")


@dataclass
class AudioOptions:
    """Options of the audio modality; the log-mel defaults are those of CLAP."""

    # Length of a window in seconds. None: max_length_s of the CLAP folder, else 10.
    piece_seconds: float | None = None
    # Maximum number of windows per recording; the rest of a longer recording is not used.
    max_pieces: int = 8
    # How the last window is padded: "pad" with zeros, "repeatpad" or "repeat" with its own content (CLAP's names).
    # None: as in the preprocessor of the CLAP folder, else "pad".
    padding: str | None = None
    # The recording is resampled to this rate, in Hz.
    sampling_rate: int = 48000
    # Number of mel bands. 0: that of the CLAP encoder, or 64.
    n_mels: int = 0
    # Hop of the spectrogram, in samples.
    hop_length: int = 480
    # Window length of the spectrogram, in samples.
    fft_window_size: int = 1024
    # Lower end of the mel bands in Hz.
    frequency_min: float = 50.0
    # Upper end of the mel bands in Hz. 0: the smaller of 14000 and half the sampling rate.
    frequency_max: float = 0.0
    # The log-mel, in dB, becomes (dB - mel_mean) / mel_std. CLAP normalises internally; use -40 and 40 for `identity`.
    mel_mean: float = 0.0
    # Divisor of the log-mel in dB; see `mel_mean`.
    mel_std: float = 1.0


@register("audio")
class AudioModality(Modality):
    """A recording, mixed to mono, as log-mel windows.

    A window is [1, frames, mels] for CLAP ([4, frames, mels] if it fuses features of long recordings) and
    [frames, mels] for any other encoder.

    Raises:
        ConfigError: an option is out of range, or does not fit the encoder.
    """

    extensions: ClassVar[tuple[str, ...]] = (
        "wav",
        "flac",
        "ogg",
        "oga",
        "opus",
        "mp3",
        "m4a",
        "aac",
        "mka",
        "aif",
        "aiff",
    )
    Options: ClassVar[type] = AudioOptions
    pieces_grow_with_size: ClassVar[bool] = True

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__(config)
        described = preprocessor(config.encoder, "feature_extractor") if config.encoder.type == "clap" else {}
        if self.options.piece_seconds is None:
            self.options.piece_seconds = float(described.get("max_length_s", 10.0))
        if self.options.padding is None:
            self.options.padding = described.get("padding", "pad")
        require_above(
            self.options, piece_seconds=0, max_pieces=0, sampling_rate=0, n_mels=-1, hop_length=0, fft_window_size=1
        )
        require_above(self.options, mel_std=0, frequency_min=-1, frequency_max=-1)
        if self.options.padding not in ("pad", "repeatpad", "repeat"):
            raise ConfigError(f"options.padding={self.options.padding!r} is not pad, repeatpad or repeat.")
        self.channels = 0
        if config.encoder.type == "clap":
            architecture = transformers_config(config.encoder)
            self.channels = 4 if architecture.enable_fusion else 1
            self.extractor = self._extractor(config, described, architecture.num_mel_bins)
        else:
            self.extractor = self._extractor(config, described, self.options.n_mels or 64)
        self.sampling_rate = int(self.extractor.sampling_rate)
        self.samples = round(self.options.piece_seconds * self.sampling_rate)
        if self.samples < self.extractor.fft_window_size:
            raise ConfigError(
                f"options.piece_seconds={self.options.piece_seconds} is {self.samples} samples, less than one FFT "
                f"window of {self.extractor.fft_window_size}. Increase piece_seconds or reduce fft_window_size."
            )
        self.log_mel = LogMel(self.extractor, self.channels == 4, self.options.padding, self.samples)

    def _extractor(self, config: ModalityConfig, described: dict[str, Any], mels: int) -> Any:
        from transformers import ClapFeatureExtractor

        options = self.options
        if described:
            self._refuse_given(config.options, config.encoder)
            extractor = ClapFeatureExtractor.from_dict(described)
        else:
            extractor = ClapFeatureExtractor(
                feature_size=options.n_mels or mels,
                sampling_rate=options.sampling_rate,
                hop_length=options.hop_length,
                fft_window_size=options.fft_window_size,
                frequency_min=options.frequency_min,
                frequency_max=options.frequency_max or min(14000.0, options.sampling_rate / 2),
            )
        if extractor.feature_size != mels:
            raise ConfigError(
                f"The log-mel has {extractor.feature_size} bands but the encoder takes {mels}. Set options.n_mels to "
                "0, or fix the folder's preprocessor_config.json."
            )
        return extractor

    @staticmethod
    def _refuse_given(given: Mapping[str, Any], encoder: EncoderConfig) -> None:
        for name in FIXED_BY_FOLDER:
            if name in given:
                raise ConfigError(f"options.{name} is fixed by the preprocessor of {encoder.path!r}. Remove it.")

    @classmethod
    def probe(
        cls, data: bytes, extension: str, attributes: Mapping[str, Any], limits: LimitsConfig = DEFAULT_LIMITS
    ) -> tuple[float, float]:
        """Duration in seconds and sampling rate in Hz: from the header, or by decoding if the header is unreliable.

        Raises:
            MediaError: unreadable, empty, or beyond a limit.
        """
        with opened(data, limits) as sound:
            return sound.count(limits) / sound.rate, float(sound.rate)

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """Number of windows of `piece_seconds` that cover the recording, [n] int64, from [n, 2] durations and rates."""
        return count_in_time(sizes[:, 0], self.options.piece_seconds, self.options.max_pieces)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """[channels, frames, mels] for CLAP, else [frames, mels]."""
        spectrogram = (1 + self.samples // self.extractor.hop_length, self.extractor.feature_size)
        return (self.channels, *spectrogram) if self.channels else spectrogram

    def waveform(self, data: bytes, pieces: int) -> np.ndarray:
        """The first `pieces` windows as mono audio at the encoder's rate, [samples] float32 in -1 to 1.

        Raises:
            MediaError: there are fewer samples than the header states, or non-finite values.
        """
        with opened(data, self.limits) as sound:
            wanted = int(np.ceil(pieces * self.options.piece_seconds * sound.rate))
            return resample(sound.mono(wanted), sound.rate, self.sampling_rate)

    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> np.ndarray:
        """Log-mel windows, [pieces, *piece_shape] float32; each within 1e-4 dB of the output of CLAP's own extractor.

        Raises:
            MediaError: as in `waveform`.
        """
        wave = self.waveform(data, pieces)[: pieces * self.samples]
        # Rounding of the resampled length may leave the last window without any samples.
        wave = to_length(wave, max(len(wave), (pieces - 1) * self.samples + 1))
        starts = range(0, len(wave), self.samples)
        mel = np.stack([self.log_mel(wave[start : start + self.samples]) for start in starts])
        if (self.options.mel_mean, self.options.mel_std) != (0.0, 1.0):
            mel = (mel - np.float32(self.options.mel_mean)) / np.float32(self.options.mel_std)
        # Windows are never longer than what the encoder takes, so that all it fuses is the same.
        return np.broadcast_to(mel[:, None], (pieces, *self.piece_shape)) if self.channels else mel
