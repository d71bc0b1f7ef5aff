"""Rows of a data set on disk: parquet files, a folder saved by `datasets`, or .json, .jsonl and .csv files.

Parquet and saved folders stay on disk, memory-mapped by `datasets`; images and sounds in them stay encoded.
"""

from __future__ import annotations

import csv
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.data.records import DataError
from megatron_anymal.data.samples import read_lines

_ROWS_AT_ONCE = 512


class Rows(ABC):
    """The rows of a data set."""

    # Description for error messages.
    where: str
    # Names of the top-level columns.
    columns: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """All rows in order, with these top-level columns only."""

    @abstractmethod
    def cell(self, row: int, column: str) -> Any:
        """The value of a top-level column."""

    @abstractmethod
    def file_of(self, row: int) -> str:
        """Name, without extension, of the file that a row is from; empty if unknown."""

    def require(self, paths: Sequence[str]) -> list[str]:
        """Top-level columns of column paths.

        Raises:
            DataError: naming the column that is missing, and those that are present.
        """
        names = list(dict.fromkeys(path.split(".")[0] for path in paths if path))
        for name in names:
            if name not in self.columns:
                raise DataError(
                    f"{self.where}: the column {name!r} is missing; present: {', '.join(self.columns) or 'none'}. "
                    "Name the folder of the data set in the task file's `source`, or adapt the task file."
                )
        return names

    def fingerprint(self) -> str:
        """Hash of the number of rows and of the first and last rows' plain columns."""
        ends = [{column: self.cell(row, column) for column in self.columns} for row in {0, len(self) - 1} if len(self)]
        return hashlib.sha256(f"{len(self)} {json.dumps(ends, default=_digest)}".encode()).hexdigest()


class JsonRows(Rows):
    """Rows in memory, of .json, .jsonl and .csv files."""

    def __init__(self, paths: Sequence[Path]):
        """Read the files.

        Raises:
            DataError: a file does not hold rows.
        """
        self.where = f"{str(paths[0])!r}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        self._rows = [(row, path.stem) for path in paths for row in _rows_of(path)]
        self.columns = tuple(dict.fromkeys(column for row, _ in self._rows for column in row))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """As `Rows.read`; a column that a row lacks is None."""
        for row, _ in self._rows:
            yield {column: row.get(column) for column in columns}

    def cell(self, row: int, column: str) -> Any:
        """As `Rows.cell`."""
        return self._rows[row][0].get(column)

    def file_of(self, row: int) -> str:
        """As `Rows.file_of`."""
        return self._rows[row][1]


class ArrowRows(Rows):
    """Rows of a `datasets.Dataset`, without decoding media."""

    def __init__(self, where: str, dataset: Any, file: str = ""):
        self.where, self._file = where, file
        self._dataset = dataset.with_format("arrow")
        self.columns = tuple(dataset.column_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """As `Rows.read`."""
        chosen = self._dataset.select_columns(list(columns))
        for start in range(0, len(chosen), _ROWS_AT_ONCE):
            yield from chosen[start : start + _ROWS_AT_ONCE].to_pylist()

    def cell(self, row: int, column: str) -> Any:
        """As `Rows.cell`."""
        return self._dataset.select_columns([column])[row : row + 1].to_pylist()[0][column]

    def file_of(self, row: int) -> str:
        """As `Rows.file_of`."""
        return self._file


def open_rows(folder: Path, patterns: Sequence[str], split: str) -> Rows:
    """Open the data set in a folder.

    Args:
        patterns: of files, relative to the folder; those of the first pattern that matches are used.
        split: of a saved DatasetDict.

    Raises:
        DataError: the folder is missing, or holds neither a saved data set nor files of these patterns.
    """
    if not folder.is_dir():
        raise DataError(f"There is no data folder {str(folder)!r}. Name it with --task NAME=FOLDER or --data-root.")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(folder, split)
    for pattern in patterns:
        if paths := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return _parquet(folder, paths) if paths[0].suffix == ".parquet" else JsonRows(paths)
    raise DataError(
        f"{str(folder)!r} holds no files {' or '.join(patterns)} and no data set saved by `datasets`. Correct the path."
    )


def lookup(value: Any, path: str) -> Any:
    """The value at a path of names separated by dots; in a list, the path is followed in every entry."""
    name, _, rest = path.partition(".")
    if isinstance(value, (list, tuple)):
        return [lookup(entry, path) for entry in value]
    inner = value.get(name) if isinstance(value, Mapping) else None
    return lookup(inner, rest) if rest else inner


def _saved(folder: Path, split: str) -> Rows:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(folder))
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise DataError(f"{str(folder)!r} has no split {split!r}; it has: {', '.join(loaded)}.")
        loaded = loaded[split]
    return ArrowRows(repr(str(folder)), loaded)


def _parquet(folder: Path, paths: Sequence[Path]) -> Rows:
    from datasets import load_dataset

    names = [str(path) for path in paths]
    dataset = load_dataset("parquet", data_files={"rows": names}, split="rows")
    return ArrowRows(repr(str(folder)), dataset, paths[0].stem if len(paths) == 1 else "")


def _rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [value for _, value in read_lines(path)]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not JSON: {error}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{str(path)!r} must be a list of objects, one per row.")
    return rows


def _digest(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
