"""Reading of a JSON file that is one long array, element by element: memory does not grow with the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.json_text import parse_next
from megatron_anymal.data.records import DataError
from megatron_anymal.data.samples import UTF16_MARKS, read_lines

_SPACE = " \t\r\n"


def read_objects(path: Path, limits: LimitsConfig) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The objects of a .jsonl file, or of a .json file that is one array, each with its place and its number from 1.

    Raises:
        DataError: the file is not of this form, or an element is not an object or exceeds a limit; it is named.
    """
    if path.suffix == ".jsonl":
        for number, (where, value) in enumerate(read_lines(path, limits), start=1):
            yield where, number, value
        return
    for number, value in enumerate(_elements(path, limits), start=1):
        where = f"{path}[{number - 1}]"
        if not isinstance(value, dict):
            raise DataError(f"{where}: not a JSON object.")
        yield where, number, value


def _elements(path: Path, limits: LimitsConfig) -> Iterator[Any]:
    """The elements of the array in a file."""
    text = _Text(path, limits)
    if text.after_space() != "[":
        raise DataError(f"{path}: the file must be a JSON array of samples; it begins with {text.shown()!r}.")
    text.position += 1
    number = 0
    if text.after_space() == "]":
        text.end()
        return
    while True:
        yield text.element(f"{path}[{number}]")
        number += 1
        mark = text.after_space()
        if mark == "]":
            text.end()
            return
        if mark != ",":
            following = f"{text.shown()!r}" if mark else "the end of the file"
            raise DataError(f"{path}: after element {number - 1}, `,` or `]` must follow, not {following}.")
        text.position += 1
        if text.after_space() == "]":
            raise DataError(f"{path}: a comma follows the last element, {number - 1}. Remove it.")


class _Text:
    """A window of a text file that moves forward."""

    def __init__(self, path: Path, limits: LimitsConfig):
        with path.open("rb") as start:
            if start.read(2) in UTF16_MARKS:
                raise DataError(f"{path}: the file is UTF-16. Save it as UTF-8.")
        self._path, self._limits = path, limits
        self._file = path.open(encoding="utf-8-sig", newline="")
        self._window, self.position, self._ended = "", 0, False

    def _fill(self) -> None:
        """Hold at least one longest element after the position."""
        longest = self._limits.max_text_bytes
        if self._ended or len(self._window) - self.position > longest:
            return
        try:
            block = self._file.read(4 * longest)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from None
        self._ended = len(block) < 4 * longest
        self._window, self.position = self._window[self.position :] + block, 0
        if self._ended:
            self._file.close()

    def after_space(self) -> str:
        """Skip white space; return the next character, "" at the end of the file."""
        while True:
            self._fill()
            while self.position < len(self._window) and self._window[self.position] in _SPACE:
                self.position += 1
            if self.position < len(self._window) or self._ended:
                return self._window[self.position : self.position + 1]

    def shown(self) -> str:
        """The next characters, for a message."""
        return self._window[self.position : self.position + 40].split("\n")[0]

    def element(self, where: str) -> Any:
        """The value that begins here; the position moves behind it.

        Raises:
            DataError: it is not JSON, or exceeds a limit.
        """
        self.after_space()
        value, self.position = parse_next(self._window, self.position, where, self._limits)
        return value

    def end(self) -> None:
        """Move behind the array's closing bracket, and check that the file ends there.

        Raises:
            DataError: it does not.
        """
        self.position += 1
        if self.after_space():
            raise DataError(f"{self._path}: text follows the end of the array: {self.shown()!r}.")
