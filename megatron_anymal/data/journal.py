"""Append-only .jsonl files: every row is on disk before the work goes on, so that a killed process loses none."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.json_text import parse_json_text
from megatron_anymal.data.records import DataError

# The rows are this program's own; a long answer must not make its journal unreadable.
_LIMITS = LimitsConfig(max_text_bytes=2**28, max_json_depth=64)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal, which another process may be writing; none if there is no such file.

    An incomplete last line is left out: its writer was killed before it reported the row as kept.

    Raises:
        DataError: a complete line is not a JSON object; the message names it.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse_json_text(line, f"{path}:{number}", _LIMITS)
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object. Remove the line, or restore the file.")
        rows.append(row)
    return rows


class Journal:
    """A journal that this process writes; any number of threads may append."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, lock it and cut off an incomplete last line.

        Raises:
            DataError: another process writes it, or a line is damaged.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock_file(path)
            # The rows that were found.
            self.rows = read_journal(path)
            os.ftruncate(self._descriptor, path.read_bytes().rfind(b"\n") + 1)
            sync_folder(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._lock = threading.Lock()

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows and wait until they are on disk.

        Raises:
            OSError: they cannot be written; the file is as before.
        """
        lines = (json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for row in rows)
        data = b"".join(lines)
        with self._lock:
            size = os.fstat(self._descriptor).st_size
            try:
                written = 0
                while written < len(data):
                    written += os.write(self._descriptor, data[written:])
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise

    def close(self) -> None:
        """Close the file, which unlocks it; a thread that appends later gets an OSError."""
        with self._lock:
            os.close(self._descriptor)
            # The number may be given to another file.
            self._descriptor = -1

    def _lock_file(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{str(path)!r} is being written by another process. Wait for it, or end it.") from None


def sync_folder(folder: Path) -> None:
    """Make the names of new and renamed files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
