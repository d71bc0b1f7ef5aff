"""Rows and ranges of rows are those of the table, whether it is in memory, mapped, or read from its file."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_anymal.data import row_reader
from megatron_anymal.data.index_format import MEDIA
from megatron_anymal.data.row_reader import RowReader


def made_up(count: int = 300) -> np.ndarray:
    table = np.zeros(count, MEDIA)
    table["offset"], table["kind"] = np.arange(count) * 7, np.arange(count) % 5
    table["size"] = np.random.default_rng(0).uniform(size=(count, 2))
    return table


@pytest.fixture(params=["in memory", "mapped", "from the file"])
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RowReader:
    if request.param == "in memory":
        return RowReader(made_up())
    if request.param == "from the file":
        monkeypatch.setattr(row_reader, "_RESIDENT", 0)
    np.save(tmp_path / "table.npy", made_up())
    return RowReader(np.load(tmp_path / "table.npy", mmap_mode="r"))


@pytest.mark.parametrize(
    "rows", [[3], [0, 1, 2], [299], [], [1, 0], [0, 2], [0, 0, 2], [2, 2, 2], [4, 5, 5, 7], [299, 3, 150]]
)
def test_rows(reader: RowReader, rows: list[int]) -> None:
    given = np.array(rows, np.int64)
    np.testing.assert_array_equal(reader.take(given), made_up()[given])


@pytest.mark.parametrize("seed", range(10))
def test_ranges(reader: RowReader, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 6, size=40)
    start = rng.integers(0, 294, size=40)
    expected = np.concatenate([made_up()[a : a + n] for a, n in zip(start, count)])
    np.testing.assert_array_equal(reader.take_ranges(start, count), expected)


def test_consecutive_ranges_are_a_view(reader: RowReader) -> None:
    rows = reader.take_ranges(np.array([10, 12, 90, 12]), np.array([2, 0, 0, 30]))
    np.testing.assert_array_equal(rows, made_up()[10:42])
    assert np.shares_memory(rows, reader._table)
    assert not np.shares_memory(reader.take(np.array([10, 12])), reader._table)


@pytest.mark.parametrize(("start", "count"), [(300, 1), (-1, 1), (298, 3), (0, 301)])
def test_rows_that_a_damaged_index_does_not_have(reader: RowReader, start: int, count: int) -> None:
    with pytest.raises(IndexError, match="a table of 300 rows has no row"):
        reader.take_ranges(np.array([start, 5]), np.array([count, 1]))


def test_a_table_that_is_replaced_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "_RESIDENT", 0)
    np.save(tmp_path / "table.npy", made_up())
    reader = RowReader(np.load(tmp_path / "table.npy", mmap_mode="r"))
    np.save(tmp_path / "new.npy", np.zeros(300, MEDIA))
    (tmp_path / "new.npy").replace(tmp_path / "table.npy")
    np.testing.assert_array_equal(reader.take(np.array([7, 3])), made_up()[[7, 3]])


def test_a_file_that_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "_RESIDENT", 0)
    np.save(tmp_path / "table.npy", made_up())
    reader = RowReader(np.load(tmp_path / "table.npy", mmap_mode="r"))
    os.truncate(tmp_path / "table.npy", 4000)
    with pytest.raises(IndexError, match=r"table.npy has been cut off"):
        reader.take(np.array([299, 3]))


def test_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "_RESIDENT", 0)
    np.save(tmp_path / "table.npy", made_up())
    reader = RowReader(np.load(tmp_path / "table.npy", mmap_mode="r"))
    file = reader._file
    os.fstat(file)
    del reader
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
