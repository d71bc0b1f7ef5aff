"""IMU: 6-channel motion signals as pieces of fixed length (AnyMAL section 3.1; windows as in IMU2CLIP)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from megatron_anymal.config import ConfigError, ModalityConfig
from megatron_anymal.modalities.base import MediaError, Modality, count_in_time, require_above
from megatron_anymal.modalities.registry import register

# Three axes of the accelerometer, then three of the gyroscope.
CHANNELS = 6
TIME_COLUMNS = ("time", "timestamp")


@dataclass
class IMUOptions:
    """Options of the IMU modality; the defaults are IMU2CLIP's 5-second windows at 200 Hz."""

    # Signals are resampled (linearly) to this rate, in Hz.
    rate: float = 200.0
    # Length of a piece.
    piece_seconds: float = 5.0
    # Most pieces of a recording; what lies behind them is not used.
    max_pieces: int = 8
    # How the last piece is filled up: "zero", or "edge" with its last value.
    padding: str = "zero"
    # Six numbers each: a channel becomes (value - mean) / std before padding. None: values as they are.
    mean: list[float] | None = None
    std: list[float] | None = None


def _parse_npy(data: bytes) -> np.ndarray:
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
        return np.asarray(values, dtype=np.float64)
    # numpy raises ValueError, EOFError, OSError, TypeError and tokenizer errors on damaged headers.
    except Exception as error:
        raise MediaError(f"cannot be read as an npy array of numbers: {error}") from error


def _parse_csv(data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Values [rows, 6] and, where there is a time column, seconds [rows]."""
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise MediaError(f"cannot be read as csv: {error}") from error
    header: list[str] = []
    if rows and not any(_is_number(cell) for cell in rows[0]):
        header, rows = [cell.strip().lower() for cell in rows[0]], rows[1:]
    columns = len(header or (rows[0] if rows else []))
    for number, row in enumerate(rows):
        if len(row) != columns or not all(_is_number(cell) for cell in row):
            raise MediaError(f"row {number} is not {columns} numbers: {','.join(row)[:80]!r}")
    values = np.array([[float(cell) for cell in row] for row in rows], dtype=np.float64).reshape(len(rows), columns)
    named = [place for place, name in enumerate(header) if name in TIME_COLUMNS]
    if not named:
        return values, None
    return np.delete(values, named[0], axis=1), values[:, named[0]]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_signal(data: bytes, extension: str, attributes: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, float]:
    """The signal of a file.

    Returns:
        Values [rows, 6] float64, their times in seconds from 0, [rows], and the rate in Hz.

    Raises:
        MediaError: unreadable, empty, of another shape, not finite, or without a rate.
    """
    if not data:
        raise MediaError("is empty (0 bytes)")
    times: np.ndarray | None = None
    if extension.rpartition(".")[2] == "csv":
        values, times = _parse_csv(data)
    else:
        values = _parse_npy(data)
    if values.size == 0:
        raise MediaError("holds no rows")
    if values.ndim != 2 or values.shape[1] != CHANNELS:
        named = " (and a column named time or timestamp)" if extension.endswith("csv") else ""
        raise MediaError(f"has shape {list(values.shape)}, not [rows, {CHANNELS}]{named}")
    finite = np.isfinite(values).all(axis=1) & (np.isfinite(times) if times is not None else True)
    if not finite.all():
        raise MediaError(f"row {int(np.flatnonzero(~finite)[0])} holds NaN or infinity")
    if times is not None:
        return values, *_from_time_column(times)
    rate = attributes.get("rate")
    if rate is None:
        raise MediaError('states no sampling rate: give it with the sample, {"rate": 100}, or as a csv time column')
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (np.isfinite(rate) and rate > 0):
        raise MediaError(f"states the sampling rate {rate!r}: it must be a number of Hz above 0")
    return values, np.arange(len(values)) / rate, float(rate)


def _from_time_column(times: np.ndarray) -> tuple[np.ndarray, float]:
    """Times from 0 and the mean rate in Hz."""
    steps = np.diff(times)
    if len(times) < 2:
        raise MediaError("has a time column but fewer than 2 rows, so no rate")
    if (steps <= 0).any():
        raise MediaError(f"row {int(np.flatnonzero(steps <= 0)[0]) + 1} is not later than the one before it")
    return times - times[0], (len(times) - 1) / float(times[-1] - times[0])


@register("imu")
class IMUModality(Modality):
    """An accelerometer's and a gyroscope's signal as pieces [6, samples].

    Files: npy [rows, 6], or csv of 6 columns, with or without a header, and optionally a column named `time` or
    `timestamp` in seconds. Without it the rate comes with the sample as {"rate": Hz}.
    """

    extensions: ClassVar[tuple[str, ...]] = ("npy", "csv")
    Options: ClassVar[type] = IMUOptions

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
            raise ConfigError(f"options.{name} must hold {CHANNELS} numbers, one a channel, not {len(values)}.")
        return np.full(CHANNELS, default) if values is None else np.asarray(values, dtype=np.float64)

    @classmethod
    def probe(cls, data: bytes, extension: str, attributes: Mapping[str, Any]) -> tuple[float, float]:
        """Duration in seconds and sampling rate in Hz."""
        values, _, rate = read_signal(data, extension, attributes)
        return len(values) / rate, rate

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """Pieces of `piece_seconds` that cover the recording."""
        return count_in_time(sizes[:, 0], self.options.piece_seconds, self.options.max_pieces)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """[6, samples]."""
        return (CHANNELS, self.samples)

    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> torch.Tensor:
        """Pieces of the signal, [pieces, 6, samples] float32."""
        values, times, rate = read_signal(data, extension, attributes)
        values = (values - self.mean) / self.std
        total = pieces * self.samples
        length = min(total, max(1, round(len(values) / rate * self.options.rate)))
        at = np.arange(length) / self.options.rate
        signal = np.stack([np.interp(at, times, channel) for channel in values.T])
        mode: Any = "edge" if self.options.padding == "edge" else "constant"
        signal = np.pad(signal, ((0, 0), (0, total - length)), mode=mode)
        pieces_first = signal.reshape(CHANNELS, pieces, self.samples).swapaxes(0, 1)
        return torch.from_numpy(np.ascontiguousarray(pieces_first, dtype=np.float32))
