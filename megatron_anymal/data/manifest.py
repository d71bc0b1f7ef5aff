"""Manifests: lists of media files and texts as a .jsonl or .csv file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.config import DEFAULT_LIMITS, LimitsConfig
from megatron_anymal.data.records import DataError
from megatron_anymal.data.samples import read_lines
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.data.shard_writer import pack
from megatron_anymal.data.source_records import Record, Source
from megatron_anymal.data.tables import read_table

_COLUMNS = ("key", "media", "modality", "text")


def write_shards(
    manifest: str,
    out: str,
    samples_per_shard: int = 2000,
    overwrite: bool = False,
    limits: LimitsConfig = DEFAULT_LIMITS,
) -> None:
    """Pack a manifest's samples into WebDataset shards; see `ManifestSource` and `shard_writer.pack`.

    Raises:
        DataError: naming the line that cannot be read, or the first of too many that cannot be used.
    """
    pack(ManifestSource(manifest, limits), out, samples_per_shard, overwrite, limits=limits)


class ManifestSource(Source):
    """The samples of a manifest.

    A .jsonl line is a sample (data/samples.py) with an optional `key`, or `{"key": ..., "media": PATH, "text": ...}`. A
    .csv file (separated by commas, semicolons or tabs) has the columns media and text, and optionally key, modality and
    attributes of the media (such as rate). Paths are relative to the manifest.

    Raises:
        DataError: there is no such file, or its ending is not one of a manifest.
    """

    base_name = "the manifest"

    def __init__(self, manifest: str, limits: LimitsConfig = DEFAULT_LIMITS):
        path = Path(manifest)
        if not path.is_file():
            raise DataError(
                f"There is no manifest {manifest!r}. Give a .csv or .jsonl file, or name what wrote the data by --from."
            )
        if path.suffix not in (".csv", ".jsonl"):
            raise DataError(f"The manifest {manifest!r} must be a .csv or a .jsonl file.")
        super().__init__(manifest, path.parent)
        self._path, self._limits = path, limits

    def files(self) -> Sequence[Path]:
        """The manifest."""
        return [self._path]

    def records(self) -> Iterator[Record]:
        """One sample per line.

        Raises:
            DataError: naming the line that cannot be read.
        """
        for where, number, value in self._lines():
            columns = {name: item for name, item in value.items() if name not in ("parts", "messages")}
            yield _record(where, number, value, columns)

    def _lines(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        if self._path.suffix == ".jsonl":
            for where, value in read_lines(self._path, self._limits):
                yield where, int(where.rpartition(":")[2]), value
        else:
            for row in read_table(self._path, ("media", "text"), self._limits, _lower):
                yield row.where, row.number, {name: _cell(name, text) for name, text in row.cells.items()}


def _lower(name: str) -> str:
    return name.lower() if name.lower() in _COLUMNS else name


def _cell(column: str, text: str) -> Any:
    """The value of a .csv cell. Media attributes, such as the rate of an IMU, are parsed as JSON if possible."""
    if column in _COLUMNS:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _record(where: str, number: int, value: dict[str, Any], columns: dict[str, Any]) -> Record:
    """The record of a line; the short form is written out."""
    key, wrong = value.get("key"), None
    if "parts" not in value and "messages" not in value:
        missing = [name for name in ("media", "text") if name not in value]
        if missing:
            needed = f"a line needs `parts`, `messages`, or `media` and `text`; `{missing[0]}` is missing or empty"
            wrong = SampleError("text", f"{needed}. Add it, or remove the line.")
        else:
            media = {k: v for k, v in value.items() if k not in ("key", "text")}
            value = {"parts": [media, {"text": value["text"]}]}
    return Record(where, number, value, key, columns, wrong=wrong)
