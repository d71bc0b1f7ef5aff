"""Indexing of a folder of shards: several processes read each new or changed shard once, and a summary is printed."""

from __future__ import annotations

from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_processes import ShardReader, index_shards
from megatron_anymal.data.index_totals import RowStore, complete_index
from megatron_anymal.data.index_writer import RowSpool, open_spool
from megatron_anymal.data.indexed_shards import IndexedShards, indexed_shards
from megatron_anymal.data.shard_listing import ShardFile, find_shards
from megatron_anymal.data.tokenizer import Tokenizer


def make_index(
    folder: str, options: IndexOptions, workers: int = 1, max_bad_share: float = 0.01, rebuild: bool = False
) -> None:
    """Index a folder. Shards that its index has already, built with the same options, are read only if they changed.

    Args:
        workers: maximum number of processes; a small folder is indexed by fewer.
        max_bad_share: maximum share of samples that may be left out, and of bytes that may be unreadable.
        rebuild: read every shard.

    Raises:
        DataError: there are no shards, the tokenizer cannot be used, nothing can be written next to the shards, or
            more is left out than allowed. The ledger is written in the last case, too.
        ConfigError: a plug-in cannot be imported.
        StorageError: the object store cannot be used.
    """
    files = find_shards(folder)
    reader = ShardReader(folder, options, Tokenizer(options.tokenizer))
    identity = reader.identity()
    indexed = IndexedShards(None) if rebuild else indexed_shards(folder, identity)
    with open_spool(folder) as spool:
        kept = _read(reader, files, indexed, spool, workers)
        if kept or indexed.reason:
            why = f": {indexed.reason}" if indexed.reason else ""
            print(f"{folder}: {len(kept)} shards kept, {len(files) - len(kept)} read{why}")
        stores: dict[str, RowStore] = {name: indexed if name in kept else spool for name in files}
        complete_index(folder, stores, identity, max_bad_share)


def _read(
    reader: ShardReader, files: dict[str, ShardFile], indexed: IndexedShards, spool: RowSpool, workers: int
) -> set[str]:
    """Read shards into the spool; returns the names of those that the index has."""
    unchanged = {name for name, file in files.items() if indexed.unchanged(file)}
    new = [file for name, file in files.items() if name not in unchanged]
    for rows in index_shards(reader, new, workers):
        spool.add(rows)
    kept = indexed.usable(unchanged, any(spool.entry(file.name)["text_with_media"] for file in new))
    for rows in index_shards(reader, [files[name] for name in files if name in unchanged - kept], workers):
        spool.add(rows)
    return kept
