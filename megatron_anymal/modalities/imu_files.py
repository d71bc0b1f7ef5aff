"""Reading of IMU files (npy and csv) as times and six channels; only the beginning of a long recording is kept."""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities.base import MediaError, reason, require_within
from megatron_anymal.modalities.imu_columns import SECONDS_OF, Columns, columns_of

# Plausible rates in Hz: times without a unit are taken as seconds only if they give a rate in this range.
USUAL_RATES = (5.0, 5000.0)
# Upper bound of the rate of any IMU (Hz).
HIGHEST_RATE = 20_000.0
# A time step longer than this multiple of the median step is a gap, which is refused.
LONGEST_STEP = 20
# Allowed relative difference between `rate` and the rate of a time column, because nominal rates are inexact.
RATE_TOLERANCE = 0.05
# Rows processed at a time, maximum characters per csv line, and maximum number of steps used for the median.
BLOCK, LONGEST_LINE, MEDIAN_OF = 2**14, 2**16, 2**20


@dataclass(frozen=True)
class Signal:
    """A recording.

    Attributes:
        rows: number of rows in the whole file.
        rate: mean rate of the whole file in Hz.
        values: [kept, 6] float64: accelerometer x, y, z, gyroscope x, y, z.
        times: seconds from 0, [kept] float64.
    """

    rows: int
    rate: float
    values: np.ndarray
    times: np.ndarray


def read_signal(
    data: bytes, extension: str, attributes: Mapping[str, Any], limits: LimitsConfig, seconds: float = 0.0
) -> Signal:
    """Read a file, check all of it and keep its first `seconds`.

    Raises:
        MediaError: the file is unreadable or empty, has another shape, non-finite values, no rate or a gap, or exceeds
            a limit.
    """
    if not data:
        raise MediaError("is empty (0 bytes)")
    is_csv = extension.rpartition(".")[2] == "csv"
    columns, blocks = _csv_blocks(data, attributes, limits) if is_csv else _npy_blocks(data, attributes, limits)
    times = _Times(columns, _stated_rate(attributes, columns), seconds)
    kept, rows = [], 0
    for block in blocks:
        numbers = block[:, : len(columns.channels)]
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise MediaError(f"row {rows + int(np.flatnonzero(~finite)[0])} contains NaN or infinity")
        keep = times.add(block[:, -1] if columns.time is not None else None, len(block))
        if keep:
            kept.append(np.array(numbers[:keep], dtype=np.float64))
        rows += len(block)
    if rows == 0:
        raise MediaError("contains no rows")
    rate = times.rate()
    require_within(limits, "max_seconds", rows / rate, f"lasts {rows / rate:.1f} s", "cut it")
    values = np.concatenate(kept)
    return Signal(rows, rate, values, times.first(len(values)))


def _stated_rate(attributes: Mapping[str, Any], columns: Columns) -> float | None:
    rate = attributes.get("rate")
    if rate is None:
        if columns.time is None:
            raise MediaError('has no sampling rate: add {"rate": 100} to the sample, or a time column to the csv file')
        return None
    valid = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not (valid and 0 < rate <= HIGHEST_RATE):
        raise MediaError(
            f"states the sampling rate {rate!r}: it must be a number of Hz above 0 and at most {HIGHEST_RATE:g}"
        )
    return float(rate)


class _Times:
    """Times of the rows, checked incrementally; without a time column they are computed from the rate.

    Args:
        stated: the rate in the sample's attributes.
        seconds: rows up to this time, and the one after it, are kept.
    """

    def __init__(self, columns: Columns, stated: float | None, seconds: float) -> None:
        self._has_column, self._stated, self._seconds = columns.time is not None, stated, seconds
        self._unit_stated = bool(columns.time_unit)
        self._scale = SECONDS_OF[columns.time_unit or "s"]
        self._times = array("d")
        self._rows = 0

    def add(self, column: np.ndarray | None, rows: int) -> int:
        """Add the times of a block (in the unit of the file); returns how many of its rows to keep."""
        before = self._rows
        self._rows += rows
        if column is None:
            assert self._stated is not None
            # Two further rows, so that the last sample can be interpolated.
            needed = math.ceil(self._seconds * self._stated) + 2
            return max(0, min(rows, needed - before))
        last = self._times[-1:]
        self._times.frombytes(np.ascontiguousarray(column, dtype=np.float64).tobytes())
        steps = np.diff(np.concatenate([last, column]))
        if (steps <= 0).any():
            row = before + int(np.flatnonzero(steps <= 0)[0]) + (0 if len(last) else 1)
            raise MediaError(f"row {row} is not later than the one before it")
        needed = int(np.searchsorted((column - self._times[0]) * self._scale, self._seconds, side="right")) + 1
        # The previous block may already extend past `seconds`.
        done = len(last) and (last[0] - self._times[0]) * self._scale > self._seconds
        keep = 0 if done else min(rows, needed)
        if keep and before + keep > self._seconds * HIGHEST_RATE + 2:
            raise MediaError(self._absurd(float("inf")))
        return keep

    def rate(self) -> float:
        """Mean rate in Hz.

        Raises:
            MediaError: the rate is implausible or differs from the stated one, or the times have a gap.
        """
        if not self._has_column:
            assert self._stated is not None
            return self._stated
        if self._rows < 2:
            raise MediaError("has a time column but fewer than 2 rows, so its rate is unknown")
        rate = (self._rows - 1) / ((self._times[-1] - self._times[0]) * self._scale)
        low, high = (0.0, HIGHEST_RATE) if self._unit_stated else USUAL_RATES
        if not low <= rate <= high:
            raise MediaError(self._absurd(rate))
        self._refuse_gaps()
        if self._stated is not None and abs(rate / self._stated - 1) > RATE_TOLERANCE:
            raise MediaError(
                f"states the sampling rate {self._stated:g} Hz, but its time column gives {rate:g} Hz: remove one of "
                "them, or state the unit of the times"
            )
        return rate

    def _absurd(self, rate: float) -> str:
        usual = [f"{rate * 1.0 / SECONDS_OF[unit]:g} Hz in {unit}" for unit in ("ms", "us", "ns")]
        text = f"has a time column of {rate:g} Hz if its unit is {'as stated' if self._unit_stated else 's'}"
        if self._unit_stated:
            return f"{text}; no IMU is faster than {HIGHEST_RATE:g} Hz: correct the unit"
        return (
            f"{text} ({', '.join(usual)}), outside {USUAL_RATES[0]:g} to {USUAL_RATES[1]:g} Hz: state the unit with "
            '{"time_unit": "ms"} (s, ms, us or ns) or in the name of the column, for example timestamp_ms'
        )

    def _refuse_gaps(self) -> None:
        steps = np.diff(np.frombuffer(self._times, dtype=np.float64))
        median = float(np.median(steps[:: max(1, len(steps) // MEDIAN_OF)]))
        longest = int(np.argmax(steps))
        if steps[longest] > LONGEST_STEP * median:
            raise MediaError(
                f"has a gap of {steps[longest] * self._scale:.3f} s before row {longest + 1}, more than {LONGEST_STEP} "
                f"times its median step of {median * self._scale:.4g} s: cut the recording there"
            )

    def first(self, rows: int) -> np.ndarray:
        """Times of the first rows in seconds, starting at 0."""
        if not self._has_column:
            assert self._stated is not None
            return np.arange(rows) / self._stated
        return (np.array(self._times[:rows]) - self._times[0]) * self._scale


Blocks = tuple[Columns, Iterator[np.ndarray]]


def _npy_blocks(data: bytes, attributes: Mapping[str, Any], limits: LimitsConfig) -> Blocks:
    array_of = _npy_view(data)
    if array_of.ndim != 2:
        raise MediaError(f"has shape {list(array_of.shape)}, not [rows, 6]")
    rows, width = array_of.shape
    _require_values(limits, rows, width)
    if width != 6 and "columns" not in attributes:
        raise MediaError(f'has shape [{rows}, {width}], not [rows, 6]; select six columns with {{"columns": [...]}}')
    columns = columns_of([], width, attributes)
    wanted = [*columns.channels, *([] if columns.time is None else [columns.time])]

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, rows, BLOCK):
            yield array_of[start : start + BLOCK, wanted].astype(np.float64)

    return columns, blocks()


def _npy_view(data: bytes) -> np.ndarray:
    """View of the array in an npy file, without a copy."""
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read_header[version](stream)
        if dtype.kind not in "iuf":
            raise ValueError(f"it contains {dtype} values, not real numbers")
        size = math.prod(shape) * dtype.itemsize
        present = len(data) - stream.tell()
        if size > present:
            raise ValueError(f"it states {size} bytes of data but contains {present}")
        flat = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
        return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)
    # numpy raises ValueError, EOFError, OSError, TypeError and tokenizer errors on damaged headers.
    except Exception as error:
        raise MediaError(f"cannot be read as an npy array of numbers: {reason(error)}") from error


def _require_values(limits: LimitsConfig, rows: int, width: int) -> None:
    require_within(limits, "max_values", rows * width, f"has {rows * width} numbers ({rows} x {width})", "cut it")


def _csv_blocks(data: bytes, attributes: Mapping[str, Any], limits: LimitsConfig) -> Blocks:
    """Columns and blocks of a csv file separated by commas, semicolons or tabs; the last two allow decimal commas."""
    rows = _csv_rows(data)
    first = next(rows, None)
    if first is None:
        raise MediaError("contains no rows")
    header = [] if any(_is_number(cell) for cell in first) else [cell.strip().lstrip("#").strip() for cell in first]
    columns = columns_of(header, len(first), attributes)
    wanted = [*columns.channels, *([] if columns.time is None else [columns.time])]

    def blocks() -> Iterator[np.ndarray]:
        number, numbers = 0, array("d")
        row = next(rows, None) if header else first
        while row is not None:
            try:
                if len(row) != len(first):
                    raise ValueError
                numbers.extend([_number(row[column]) for column in wanted])
            except ValueError:
                raise MediaError(f"row {number} is not {len(first)} numbers: {','.join(row)[:80]!r}") from None
            number += 1
            row = next(rows, None)
            if row is None or number % BLOCK == 0:
                _require_values(limits, number, len(first))
                yield np.array(numbers).reshape(-1, len(wanted))
                numbers = array("d")

    return columns, blocks()


def _csv_rows(data: bytes) -> Iterator[list[str]]:
    """Non-blank rows, with decimal commas converted to points."""
    stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")

    def lines() -> Iterator[str]:
        while line := stream.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise MediaError(f"has a line of more than {LONGEST_LINE} characters: it is not an IMU csv file")
            if line.strip():
                yield line

    try:
        remaining = lines()
        first = next(remaining, "")
        delimiter = next((one for one in ";\t" if one in first), ",")
        for row in csv.reader(_and_then(first, remaining), delimiter=delimiter):
            if any(cell.strip() for cell in row):
                yield row if delimiter == "," else [cell.replace(",", ".") for cell in row]
    except UnicodeDecodeError as error:
        raise MediaError(f"cannot be read as csv: it is not UTF-8 ({reason(error)})") from error
    except csv.Error as error:
        raise MediaError(f"cannot be read as csv: {error}") from error


def _and_then(first: str, others: Iterator[str]) -> Iterator[str]:
    yield first
    yield from others


def _number(cell: str) -> float:
    # Python accepts 1_000 as a number, but it does not occur in data files.
    if "_" in cell:
        raise ValueError
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True
