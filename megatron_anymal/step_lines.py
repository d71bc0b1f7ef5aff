"""JSON-lines files with one step per row, truncated when a resumed run repeats steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, each with its "step".

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop incomplete lines and the rows of steps after `step`, which will be repeated; return the remaining rows.

    Raises:
        OSError: the file cannot be written.
    """
    if not path.is_file():
        return []
    lines, rows = [], []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            stays = row["step"] <= step
        except (json.JSONDecodeError, KeyError, TypeError):
            # A run that was killed while writing leaves an incomplete line.
            continue
        if stays:
            lines.append(line + "\n")
            rows.append(row)
    part = path.with_suffix(".part")
    part.write_text("".join(lines))
    part.replace(path)
    return rows
