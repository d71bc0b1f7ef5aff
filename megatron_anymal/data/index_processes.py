"""Indexing of shards by one or several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Optional

from megatron_anymal.child_processes import end_with_parent
from megatron_anymal.data.index_builder import IndexOptions, index_shard
from megatron_anymal.data.shard_rows import ShardRows
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.modalities import load_plugins

# A process takes about half a second to start. Indexing this many bytes of shards takes longer, unless media are large.
BYTES_PER_WORKER = 32 * 2**20


def useful_workers(asked: int, sizes: Iterable[int]) -> int:
    """Number of processes, at most `asked`, that index shards of these sizes (bytes) faster than one fewer."""
    sizes = list(sizes)
    return max(1, min(asked, len(sizes), sum(sizes) // BYTES_PER_WORKER))


@dataclass(frozen=True)
class ShardReader:
    """Indexes the shards of a folder."""

    # Folder of the shards.
    folder: str
    # How samples are read from them.
    options: IndexOptions
    # Counts the tokens of texts.
    tokenizer: Tokenizer

    def read(self, number: int, name: str) -> tuple[int, ShardRows]:
        """Index the shard `name`; returns its number as well.

        Raises:
            ConfigError: a plug-in cannot be imported.
            StorageError: the object store cannot be used.
        """
        load_plugins(list(self.options.plugins))
        return number, index_shard(self.folder, name, self.tokenizer, self.options)


def index_shards(reader: ShardReader, names: Sequence[str], workers: int) -> Iterator[tuple[int, ShardRows]]:
    """Index shards. Each shard's number and rows follow as soon as it is finished.

    Args:
        workers: number of processes; 1: this one.

    Raises:
        ConfigError: a plug-in cannot be imported.
        StorageError: the object store cannot be used.
        BrokenProcessPool: a process was killed.
    """
    if workers == 1:
        yield from (reader.read(number, name) for number, name in enumerate(names))
        return
    # A fork would copy locks that other threads of a caller's process hold, without the threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_process, (reader,))
    try:
        # Without names for the jobs, the rows of a finished one are freed.
        for job in as_completed([pool.submit(_read, number, name) for number, name in enumerate(names)]):
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)


# In an indexing process, set at its start.
_reader: Optional[ShardReader] = None


def _start_process(reader: ShardReader) -> None:
    global _reader
    end_with_parent()
    _reader = reader


def _read(number: int, name: str) -> tuple[int, ShardRows]:
    assert _reader is not None
    return _reader.read(number, name)
