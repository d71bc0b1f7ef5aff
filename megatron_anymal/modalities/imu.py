"""IMU: fixed-length windows of 6-channel motion signals (AnyMAL section 3.1; window length as in IMU2CLIP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megatron_anymal.config import DEFAULT_LIMITS, ConfigError, LimitsConfig, ModalityConfig
from megatron_anymal.modalities.base import Modality, count_in_time, require_above
from megatron_anymal.modalities.imu_files import read_signal
from megatron_anymal.modalities.registry import register

# Three axes of the accelerometer, then three of the gyroscope.
CHANNELS = 6


@dataclass
class IMUOptions:
    """Options of the IMU modality; the defaults are IMU2CLIP's 5-second windows at 200 Hz."""

    # Signals are resampled (linearly) to this rate, in Hz.
    rate: float = 200.0
    # Length of a window in seconds.
    piece_seconds: float = 5.0
    # Maximum number of windows per recording; the rest of a longer recording is not used.
    max_pieces: int = 8
    # How the last window is padded: "zero", or "edge" with its last value.
    padding: str = "zero"
    # Six values: a channel becomes (value - mean) / std before padding. None: no normalisation.
    mean: list[float] | None = None
    # Six values, as for `mean`.
    std: list[float] | None = None


@register("imu")
class IMUModality(Modality):
    """Accelerometer and gyroscope signals as windows [6, samples].

    Files: npy [rows, 6]; csv with a header that names the columns in any order; or csv without a header and with 6
    columns, accelerometer then gyroscope. The rate comes from a time column or from the attribute {"rate": Hz} of the
    sample. The attributes `columns`, `time_column` and `time_unit` describe columns that cannot be identified by name.

    Raises:
        ConfigError: an option is out of range.
    """

    extensions: ClassVar[tuple[str, ...]] = ("npy", "csv")
    Options: ClassVar[type] = IMUOptions
    needs_torch: ClassVar[bool] = False
    pieces_grow_with_size: ClassVar[bool] = True

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__(config)
        require_above(self.options, rate=0, piece_seconds=0, max_pieces=0)
        if self.options.padding not in ("zero", "edge"):
            raise ConfigError(f"options.padding={self.options.padding!r} is not zero or edge.")
        self.mean = self._channels("mean", 0.0)
        self.std = self._channels("std", 1.0)
        if (self.std <= 0).any():
            raise ConfigError("options.std must be above 0 in every channel.")
        self.samples = round(self.options.piece_seconds * self.options.rate)
        if self.samples < 1:
            raise ConfigError("options.piece_seconds x options.rate is less than one sample. Raise one of them.")

    def _channels(self, name: str, default: float) -> np.ndarray:
        values = getattr(self.options, name)
        if values is not None and len(values) != CHANNELS:
            raise ConfigError(f"options.{name} must have {CHANNELS} values, one per channel, not {len(values)}.")
        return np.full(CHANNELS, default) if values is None else np.asarray(values, dtype=np.float64)

    @classmethod
    def probe(
        cls, data: bytes, extension: str, attributes: Mapping[str, Any], limits: LimitsConfig = DEFAULT_LIMITS
    ) -> tuple[float, float]:
        """Duration in seconds and sampling rate in Hz.

        Raises:
            MediaError: as in `imu_files.read_signal`.
        """
        signal = read_signal(data, extension, attributes, limits)
        return signal.rows / signal.rate, signal.rate

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """Number of windows of `piece_seconds` that cover the recording, [n] int64, from [n, 2] durations and rates."""
        return count_in_time(sizes[:, 0], self.options.piece_seconds, self.options.max_pieces)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """[6, samples]."""
        return (CHANNELS, self.samples)

    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> np.ndarray:
        """Windows of the signal, [pieces, 6, samples] float32.

        Raises:
            MediaError: as in `imu_files.read_signal`.
        """
        recording = read_signal(data, extension, attributes, self.limits, pieces * self.options.piece_seconds)
        values = (recording.values - self.mean) / self.std
        total = pieces * self.samples
        length = min(total, max(1, round(recording.rows / recording.rate * self.options.rate)))
        times = np.arange(length) / self.options.rate
        signal = np.stack([np.interp(times, recording.times, channel) for channel in values.T])
        mode: Any = "edge" if self.options.padding == "edge" else "constant"
        signal = np.pad(signal, ((0, 0), (0, total - length)), mode=mode)
        pieces_first = signal.reshape(CHANNELS, pieces, self.samples).swapaxes(0, 1)
        # Values outside the range of float32 become infinite, which `load` refuses.
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(pieces_first, dtype=np.float32)
