"""Packing of a source by any number of machines: each writes a part of the shards of a whole run."""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Optional

from megatron_anymal.config import DEFAULT_LIMITS, LimitsConfig
from megatron_anymal.data.left_out import by_rule
from megatron_anymal.data.packing_journal import PackedShard, is_unfinished, write_journal
from megatron_anymal.data.part_files import PartFiles
from megatron_anymal.data.part_of import PartOf
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_writer import (
    SampleWriter,
    packing_header,
    packing_options,
    packing_summary,
    shard_name,
)
from megatron_anymal.data.source_records import Record, Source
from megatron_anymal.telemetry import Progress

if TYPE_CHECKING:
    from megatron_anymal.data.index_builder import IndexOptions
    from megatron_anymal.data.media_encoding import MediaEncoder

# Options that parts must agree on -> how they are given.
_SPELLED = {
    "samples_per_shard": "--samples-per-shard",
    "limits": "--limit",
    "filters": "--filter",
    "kinds": "--modality",
    "attributes": "--attribute",
    "plugins": "--plugin",
}


def write_part(
    source: Source,
    out: str,
    part: PartOf,
    samples_per_shard: int = 2000,
    limits: LimitsConfig = DEFAULT_LIMITS,
    filtering: Optional[IndexOptions] = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    encoder: Optional[MediaEncoder] = None,
) -> list[str]:
    """Write each N-th shard of a source, except for those that the part has written before.

    Samples that cannot be used are left out, and each is named in the ledger; their share is that of the whole source
    and is checked when the parts are joined. A shard that lacks samples because media files were missing is written
    again.

    Args:
        samples_per_shard: samples of the source per shard, those left out included.
        filtering: its filters leave samples out. None: there are none.
        settings: the options that `filtering` and `encoder` depend on.
        encoder: encodes media as codes.

    Returns:
        File names of the part's shards.

    Raises:
        DataError: the source cannot be read, or a key occurs twice in the part; or the folder has other shards.
    """
    parts = PartFiles(out)
    total = _samples(source, out, parts, packing_options(samples_per_shard, limits, settings))
    sizes = [min(samples_per_shard, total - first) for first in range(0, total, samples_per_shard)]
    writer = SampleWriter(source, limits, filtering, encoder)
    packer = _PartPacker(Path(out), parts, writer, sum(part.items(sizes)), source.path)
    shards = []
    numbered = itertools.groupby(enumerate(source.records()), lambda entry: entry[0] // samples_per_shard)
    for number, stretch in numbered:
        if number >= len(sizes):
            raise _changed(source.path)
        if part.takes(number):
            shards.append(packer.pack(number, (record for _, record in stretch), sizes[number]))
    if len(shards) != len(part.items(sizes)):
        raise _changed(source.path)
    packer.finish(f"{source.path}: part {part}")
    return [shard.name for shard in shards if shard.name]


class _PartPacker:
    """The packing of one part."""

    def __init__(self, folder: Path, parts: PartFiles, writer: SampleWriter, samples: int, source: str):
        self._folder, self._parts, self._writer, self._source = folder, parts, writer, source
        self._progress = Progress("packing", samples)
        self._samples = self._shards = 0
        self._codes: Counter[str] = Counter()
        self._rules: Counter[str] = Counter()

    def pack(self, number: int, records: Iterator[Record], size: int) -> PackedShard:
        """Write a shard unless it is there already.

        Raises:
            DataError: a key occurs twice in the part, or there is another number of records than `size`.
        """
        shard = self._parts.packed(number)
        if shard and _is_done(self._folder, shard):
            self._writer.require_new_keys(records)
            self._progress.skip(size)
        else:
            shard = self._write(number, records, size)
        self._samples, self._shards = self._samples + shard.samples, self._shards + bool(shard.name)
        self._codes.update(entry.code for entry in shard.left_out if entry.is_bad)
        self._rules.update(by_rule(shard.left_out))
        return shard

    def _write(self, number: int, records: Iterator[Record], size: int) -> PackedShard:
        # A name of its own: a scheduler may have started the same part twice.
        unfinished = self._folder / f"{shard_name(number)}.{secrets.token_hex(6)}.part"
        try:
            shard = self._writer.write(number, unfinished, records, lambda _: self._progress.advance())
            if shard.samples + len(shard.left_out) != size:
                raise _changed(self._source)
            if shard.name:
                os.replace(unfinished, self._folder / shard.name)
            else:
                (self._folder / shard_name(number)).unlink(missing_ok=True)
        finally:
            unfinished.unlink(missing_ok=True)
        self._parts.set_packed(shard)
        return shard

    def finish(self, what: str) -> None:
        """Print what was packed, now or before."""
        self._progress.finish()
        print(f"{what}: {packing_summary(self._samples, self._shards, self._codes, self._rules)}")


def join_journals(folder: str) -> None:
    """Write the journal that a packing of the whole source writes, from what the parts have noted.

    Raises:
        DataError: a part has not packed one of its shards.
        StorageError: the object store cannot be used.
    """
    parts = PartFiles(folder)
    note = parts.manifest() or {}

    def shards() -> Iterator[PackedShard]:
        size = note["options"]["samples_per_shard"]
        for number in range(-(-note["header"]["samples"] // size)):
            shard = parts.packed(number)
            if shard is None:
                raise DataError(f"No part has packed {shard_name(number)!r} of {folder!r}. Run the parts again.")
            yield shard

    write_journal(Path(folder), note["header"], shards())
    # Left behind by processes that were killed.
    for unfinished in Path(folder).glob("*.tar.*.part"):
        unfinished.unlink(missing_ok=True)


def _samples(source: Source, out: str, parts: PartFiles, options: Mapping[str, Any]) -> int:
    """Take a folder for the shards of a source; returns the number of its samples.

    Raises:
        DataError: the folder has shards of another source, or of unknown origin; or the source has no samples.
    """
    stated: dict[str, Any] = json.loads(json.dumps({"options": dict(options), "source": source.fingerprint({})}))
    known = parts.manifest()
    if known is not None:
        of_old, of_new = known["options"], stated["options"]
        other = [_SPELLED.get(name, name) for name in {**of_old, **of_new} if of_old.get(name) != of_new.get(name)]
        if known["source"] != stated["source"]:
            other.insert(0, "manifest or data set")
        if other:
            raise DataError(
                f"{out!r} holds parts that were made with another {other[0]} than {source.path!r} now. Name another "
                "folder, or empty it."
            )
        return int(known["header"]["samples"])
    if any(Path(out).glob("*.tar")) or is_unfinished(Path(out)):
        raise DataError(f"{out!r} already holds shards. Name another folder, or empty it.")
    total = source.count()
    if not total:
        raise DataError(f"{source.path!r} has no lines or samples.")
    parts.create()
    parts.set_manifest({**stated, "header": packing_header(source, total, options)})
    return total


def _is_done(folder: Path, shard: PackedShard) -> bool:
    # Their files may be there now.
    if any(entry.code == "missing_media" for entry in shard.left_out):
        return False
    path = folder / shard.name
    return not shard.name or (path.is_file() and path.stat().st_size == shard.size)


def _changed(source: str) -> DataError:
    return DataError(f"{source!r} changed while it was read. Start again.")
