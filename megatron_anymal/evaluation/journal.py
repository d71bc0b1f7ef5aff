"""Answers on disk, written as they are computed, so that a killed evaluation continues where it was.

A folder holds settings.json and, for each copy of the model, answers.N.jsonl with one line per sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.data import journal
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
    # Reason code of a query that an integrity check rejected; empty if none did.
    rejected: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields, without an empty `rejected`."""
        return {name: value for name, value in asdict(self).items() if name != "rejected" or value}


class AnswerJournal:
    """The answers of one task under one set of settings."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: Optional[journal.Journal] = None

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
        """Answers of all copies by key; lines that were cut off are left out.

        Raises:
            DataError: a line is damaged.
        """
        rows: dict[str, AnswerRow] = {}
        for path in sorted(self.folder.glob("answers.*.jsonl")):
            for value in journal.read_journal(path):
                row = AnswerRow(value["key"], value["text"], tuple(value["log_likelihoods"]), value.get("rejected", ""))
                rows.setdefault(row.key, row)
        return rows

    def append(self, replica: int, rows: Iterable[AnswerRow]) -> None:
        """Add answers of a copy of the model.

        Args:
            replica: the copy; a journal writes the answers of one.

        Raises:
            DataError: another process adds answers of this copy, or a line is damaged.
            OSError: the file cannot be written.
        """
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = journal.Journal(self.folder / f"answers.{replica}.jsonl")
        self._file.append(*(row.to_dict() for row in rows))

    def close(self) -> None:
        """Let another process add answers."""
        if self._file is not None:
            self._file.close()
            self._file = None
