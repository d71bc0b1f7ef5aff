"""Indexing of shards by one or several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Optional

from megatron_anymal.data.index_builder import IndexOptions, index_shard
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_listing import ShardFile
from megatron_anymal.data.shard_rows import ShardRows
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.modalities import load_plugins
from megatron_anymal.processes.child_processes import end_with_parent
from megatron_anymal.telemetry import Progress

# A process takes about half a second to start. Indexing this many bytes of shards takes longer, unless media are large.
BYTES_PER_WORKER = 32 * 2**20


def useful_workers(asked: int, sizes: Iterable[int]) -> int:
    """Number of processes, at most `asked`, that index shards of these sizes (bytes) faster than one fewer."""
    sizes = list(sizes)
    return max(1, min(asked, len(sizes), sum(sizes) // BYTES_PER_WORKER))


class WorkerKilled(DataError):
    """A process that was indexing shards has been killed."""

    exit_code = 1


@dataclass(frozen=True)
class ShardReader:
    """Indexes the shards of a folder."""

    # Folder of the shards.
    folder: str
    # How samples are read from them.
    options: IndexOptions
    # Counts the tokens of texts.
    tokenizer: Tokenizer

    def identity(self) -> dict[str, Any]:
        """`IndexOptions.identity` of the rows that it reads.

        Raises:
            ConfigError: a plug-in cannot be read.
        """
        return self.options.identity(self.tokenizer.fingerprint())

    def read(self, file: ShardFile) -> ShardRows:
        """Index a shard.

        Raises:
            ConfigError: a plug-in cannot be imported.
            StorageError: the object store cannot be used.
        """
        load_plugins(list(self.options.plugins))
        rows = index_shard(self.folder, file.name, self.tokenizer, self.options)
        rows.modified = file.modified
        return rows


def index_shards(reader: ShardReader, files: Sequence[ShardFile], workers: int) -> Iterator[ShardRows]:
    """Index shards. The rows of each follow as soon as it is finished.

    Args:
        workers: maximum number of processes; few or small shards are indexed by fewer, or by this one.

    Raises:
        ConfigError: a plug-in cannot be imported.
        StorageError: the object store cannot be used.
        WorkerKilled: a process was killed.
    """
    if not files:
        return
    workers = useful_workers(workers, (file.size for file in files))
    progress = Progress("indexing shards", len(files))
    for rows in _in_processes(reader, files, workers) if workers > 1 else map(reader.read, files):
        yield rows
        progress.advance()
    progress.finish()


def _in_processes(reader: ShardReader, files: Sequence[ShardFile], workers: int) -> Iterator[ShardRows]:
    # A fork would copy locks that other threads of a caller's process hold, without the threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_process, (reader,))
    try:
        # Without names for the jobs, the rows of a finished one are freed.
        for job in as_completed([pool.submit(_read, file) for file in files]):
            yield job.result()
    except BrokenProcessPool:
        raise WorkerKilled(
            f"One of {workers} processes that index {reader.folder!r} was killed. Often the machine ran out of memory: "
            "lower --workers, and start again."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# In an indexing process, set at its start.
_reader: Optional[ShardReader] = None


def _start_process(reader: ShardReader) -> None:
    global _reader
    end_with_parent()
    _reader = reader


def _read(file: ShardFile) -> ShardRows:
    assert _reader is not None
    return _reader.read(file)
