"""Scattered rows of an index's tables."""

from __future__ import annotations

import os
import weakref
from itertools import repeat

import numpy as np

# Tables up to this size, in bytes, may become resident as a whole.
_RESIDENT = 256 * 2**20


class RowReader:
    """Reads rows of a table, and keeps large memory-mapped tables out of memory.

    Touching a page of a mapped file maps its neighbourhood, 64 KiB to 2 MiB: planning a few steps would make a table of
    any size resident. Rows of large tables are read from the file instead, which also takes less time than a page fault
    and its undoing.

    Args:
        table: [m] of any type, in memory or mapped by `numpy.load`. Its file is opened now, and may be replaced later.
    """

    def __init__(self, table: np.ndarray) -> None:
        self._table, self._file = table, -1
        if isinstance(table, np.memmap) and table.nbytes > _RESIDENT:
            assert table.filename is not None
            self._file = os.open(table.filename, os.O_RDONLY)
            # Reading ahead would read the whole table for a few steps.
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
            weakref.finalize(self, os.close, self._file)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their numbers; a view, without a copy of each, if they are consecutive.

        Args:
            rows: [n] int64 row numbers.

        Returns:
            [n] of the table's type.

        Raises:
            IndexError: the table has no such row.
        """
        return self.take_ranges(rows, np.ones(len(rows), np.int64))

    def take_ranges(self, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Rows of several ranges, one range after the other; a view if they follow each other in the table.

        Args:
            start: [n] int64 first row of each range.
            count: [n] int64 number of rows of each range.

        Returns:
            [sum of count] of the table's type.

        Raises:
            IndexError: the table has no such row.
        """
        start, count = start[count > 0], count[count > 0]
        stop = start + count
        if len(start) and not (start.min() >= 0 and stop.max() <= len(self._table)):
            raise IndexError(f"a table of {len(self._table)} rows has no row {max(int(stop.max()) - 1, 0)}")
        if (start[1:] == stop[:-1]).all():
            return self._table[int(start[0]) : int(stop[-1])] if len(start) else self._table[:0]
        if self._file < 0:
            within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
            # Ten times as fast as indexing a structured array.
            return self._table.take(np.repeat(start, count) + within)
        return self._read(start, count)

    def _read(self, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        assert isinstance(self._table, np.memmap)
        size, file = self._table.dtype.itemsize, self._file
        offsets = (self._table.offset + start * size).tolist()
        read = b"".join(map(os.pread, repeat(file), (count * size).tolist(), offsets))
        if len(read) != int(count.sum()) * size:
            raise IndexError(f"{self._table.filename} has been cut off")
        return np.frombuffer(read, self._table.dtype)
