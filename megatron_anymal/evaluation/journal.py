"""Answers on disk, written as they are computed, so that a killed evaluation continues where it was.

A folder holds settings.json and, for each copy of the model, answers.N.jsonl with one line per sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_anymal.data.records import DataError

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class AnswerRow:
    """The model's answer to a sample."""

    # Key of the sample.
    key: str
    # As generated, without surrounding white space.
    text: str
    # Log-likelihood of each candidate; empty if it was not asked for.
    log_likelihoods: tuple[float, ...] = ()


class Journal:
    """The answers of one task under one set of settings."""

    def __init__(self, folder: Path):
        self.folder = folder

    def check_settings(self, settings: Mapping[str, str], *, write: bool) -> None:
        """Compare the settings with those of the answers that the folder holds.

        Args:
            settings: everything that determines an answer.
            write: record them if there are none.

        Raises:
            DataError: they differ; the message names the first one that does.
        """
        path = self.folder / _SETTINGS
        if path.is_file():
            stored = json.loads(path.read_text())
            for name in sorted({*stored, *settings}):
                if stored.get(name) != settings.get(name):
                    raise DataError(
                        f"{str(self.folder)!r} holds answers with {name}={stored.get(name)!r}, not "
                        f"{settings.get(name)!r}. Name another --out, or delete the folder."
                    )
        elif write:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(dict(settings), indent=1))
            part.replace(path)

    def read(self) -> dict[str, AnswerRow]:
        """Answers of all copies by key; lines that were cut off are left out."""
        rows: dict[str, AnswerRow] = {}
        for path in sorted(self.folder.glob("answers.*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    value = json.loads(line)
                    row = AnswerRow(value["key"], value["text"], tuple(value["log_likelihoods"]))
                    rows.setdefault(row.key, row)
        return rows

    def append(self, replica: int, rows: Iterable[AnswerRow]) -> None:
        """Add answers of a copy of the model, after cutting off an incomplete last line.

        Raises:
            OSError: the file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"answers.{replica}.jsonl"
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        with path.open("a+b") as file:
            _cut(file.seek(0, 2), file)
            file.write(text.encode("utf-8", "surrogatepass"))


def _cut(size: int, file: BinaryIO) -> None:
    """Truncate a file after its last complete line."""
    while size:
        file.seek(size - 1)
        if file.read(1) == b"\n":
            break
        size -= 1
    file.truncate(size)
