"""Strict reading of tables of text (.csv) with a header."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.records import DataError
from megatron_anymal.data.samples import UTF16_MARKS

_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class TableRow:
    """A row of a table."""

    # File and line, for error messages.
    where: str
    # Position from 1; the header is row 1.
    number: int
    # Column name -> text; empty cells are left out.
    cells: dict[str, str]


def read_table(
    path: Path, columns: Sequence[str], limits: LimitsConfig, rename: Callable[[str], str] = str
) -> Iterator[TableRow]:
    """The rows of a table, separated by commas, semicolons or tabs; the header line decides. Empty lines are skipped.

    Args:
        columns: names that the header must have.
        limits: max_text_bytes applies to a cell.
        rename: applied to each name of the header.

    Raises:
        DataError: naming the line that is not UTF-8 or has another number of cells than the header, or the columns that
            the header lacks.
    """
    lines = _text_lines(path)
    first = next(lines, "")
    delimiter = _delimiter(first, columns, rename)
    header = _header(path, [rename(cell.strip()) for cell in next(csv.reader([first], delimiter=delimiter), [])])
    if missing := [name for name in columns if name not in header]:
        names = " and ".join(f"`{name}`" for name in columns)
        raise DataError(
            f"{path}:1: the first line must name the columns {names}, separated by commas, semicolons or tabs; "
            f"`{missing[0]}` is missing: {first.strip()[:80]!r}."
        )
    # The csv module has only this process-wide setting.
    csv.field_size_limit(limits.max_text_bytes)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 1
    try:
        for row in rows:
            if not row:
                continue
            number += 1
            where = f"{path}:{rows.line_num + 1}"
            if len(row) != len(header):
                more = "more" if len(row) > len(header) else "fewer"
                raise DataError(f"{where}: the line has {more} cells than the header. Quote {delimiter!r} in texts.")
            yield TableRow(where, number, {name: text for name, text in zip(header, row) if text != ""})
    except csv.Error as error:
        limit = f"; the longest is data.limits.max_text_bytes={limits.max_text_bytes}" if "limit" in str(error) else ""
        raise DataError(f"{path}:{rows.line_num + 1}: not a line of a .csv file ({error}{limit}).") from None


def header_of(line: str) -> list[str]:
    """The cells of a header line, split at its most frequent separator."""
    delimiter = max(_DELIMITERS, key=line.count)
    return [cell.strip().strip('"') for cell in line.strip().split(delimiter)]


def _delimiter(line: str, columns: Sequence[str], rename: Callable[[str], str]) -> str:
    """The separator that yields the columns; otherwise the most frequent one."""
    for mark in _DELIMITERS:
        if set(columns) <= {rename(name.strip().strip('"')) for name in line.split(mark)}:
            return mark
    return max(_DELIMITERS, key=line.count)


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with line breaks.

    Raises:
        DataError: naming the line that is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(UTF16_MARKS):
                raise DataError(f"{path}: the file is UTF-16. Save it as UTF-8.")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {line[error.start]:#04x} is not UTF-8. Save the file as UTF-8."
                ) from None


def _header(path: Path, names: list[str]) -> list[str]:
    twice = [name for name in names if names.count(name) > 1]
    if twice or "" in names:
        raise DataError(
            f"{path}:1: the column {(twice or [''])[0]!r} " + ("occurs twice." if twice else "has no name.")
        )
    return names
