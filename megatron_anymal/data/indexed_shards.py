"""The rows of shards that an index has, to build upon when shards are added to its folder."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from megatron_anymal.data.index_format import SAMPLE, SHARDS
from megatron_anymal.data.index_writer import renumber
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.shard_listing import ShardFile
from megatron_anymal.data.shard_rows import LOST_MEDIA, ShardRows
from megatron_anymal.data.stored_rows import restored
from megatron_anymal.object_storage.errors import StorageError


@dataclass(frozen=True)
class _Indexed:
    """A shard of an index: its accounting, and where its rows and keys begin."""

    entry: Mapping[str, Any]
    samples: int
    media: int
    keys: int


class IndexedShards:
    """The shards of an index whose rows can be used again. Files of the index may be replaced in the meantime."""

    def __init__(self, index: Optional[ShardIndex], reason: str = ""):
        """Read which shards the index has.

        Args:
            index: None: there is nothing to build upon, for the `reason`, which is printed.

        Raises:
            DataError: the index's files do not fit each other.
            FileNotFoundError: the index has no list of shards.
        """
        self.reason = reason
        self._index = index
        self._shards = _located(index) if index else {}
        self._left_out: dict[str, list[LeftOut]] = defaultdict(list)
        ledger = index.left_out() if index else []
        if index and Counter(one.code for one in ledger) != index.left_out_codes:
            raise DataError(f"The ledger of the index in {index.folder!r} is incomplete.")
        for one in ledger:
            # Repeated keys are determined again, and samples that were not packed are those of the packing's journal.
            if one.code != "repeated_key" and one.shard:
                self._left_out[one.shard].append(one)

    def unchanged(self, file: ShardFile) -> bool:
        """Whether the index has the rows of a shard as it is now.

        One that could not be read counts as changed, and so does one whose version the store does not state.
        """
        shard = self._shards.get(file.name)
        if shard is None or not file.modified:
            return False
        if (shard.entry["bytes"], shard.entry["modified"]) != (file.size, file.modified):
            return False
        return not any(one.code == "unreadable" for one in self._left_out.get(file.name, ()))

    def usable(self, names: Collection[str], text_with_media: bool) -> set[str]:
        """The names of shards that need not be read again.

        The index leaves out samples that have only a .txt if other .txt samples of the folder have media. If none has
        media any longer, they belong in the index, and their shards must be read again.

        Args:
            names: unchanged shards.
            text_with_media: whether a sample with a .txt has media in the other shards of the folder.
        """
        if text_with_media or any(self.entry(name)["text_with_media"] for name in names):
            return set(names)
        return {name for name in names if not any(one.code == LOST_MEDIA for one in self._left_out.get(name, ()))}

    def entry(self, name: str) -> Mapping[str, Any]:
        """Accounting of a shard."""
        return self._shards[name].entry

    def rows(self, name: str) -> ShardRows:
        """The rows of a shard, as if it had been read; the caller may change the arrays."""
        shard, index = self._shards[name], self._index
        assert index is not None
        entry, header = shard.entry, index.header
        samples = np.array(index.samples[shard.samples : shard.samples + entry["samples"]])
        media = np.array(index.media[shard.media : shard.media + entry["media"]])
        samples["shard"] = 0
        samples["key_offset"] -= shard.keys
        samples["media_start"] -= shard.media
        renumber(media, "kind", header.kinds, entry["kinds"])
        renumber(media, "extension", header.extensions, entry["extensions"])
        keys = index.keys_between(shard.keys, shard.keys + entry["key_bytes"])
        return restored(entry, samples, media, keys, self._left_out.get(name, []))


def indexed_shards(folder: str, identity: Mapping[str, Any]) -> IndexedShards:
    """The shards of a folder's index, if it was built with the same options.

    Args:
        identity: `IndexOptions.identity` of the rows that are needed.

    Raises:
        StorageError: the object store, or the cache for its indexes, cannot be used.
    """
    try:
        index = ShardIndex(folder)
        other = [name for name, value in identity.items() if index.options.get(name) != value]
        if other:
            how = f"with another {', '.join(other)}" if index.options else "by an earlier version"
            return IndexedShards(None, f"the index was built {how}")
        return IndexedShards(index)
    # No reason to read every shard.
    except StorageError:
        raise
    # No index, or a damaged one: every shard is read.
    except (DataError, OSError, ValueError, KeyError):
        return IndexedShards(None)


def _located(index: ShardIndex) -> dict[str, _Indexed]:
    entries = [json.loads(line) for line in index.read_file(SHARDS).splitlines()]
    columns = ("samples", "media", "key_bytes")
    sizes = np.array([[entry[name] for name in columns] for entry in entries], np.int64).reshape(-1, 3)
    starts = np.cumsum(sizes, axis=0) - sizes
    named = tuple(entry["name"] for entry in entries)
    totals = len(index.samples), len(index.media), index.key_bytes
    if index.samples.dtype != SAMPLE or named != index.header.shards or tuple(sizes.sum(axis=0)) != totals:
        raise DataError(f"The list of shards of the index in {index.folder!r} does not fit its tables.")
    return {entry["name"]: _Indexed(entry, *map(int, start)) for entry, start in zip(entries, starts)}
