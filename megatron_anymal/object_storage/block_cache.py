"""Cached blocks of objects on a local disk, shared by the processes of a node.

A block is one file. It is written under another name and renamed, so that what a crash leaves is never read. Its
modification time is that of the last use; before a block would exceed the size limit, the least recently used tenth of
the cache is removed. The contents carry no checksum of their own: readers compare members with the index, and drop the
blocks of a member that differs.

    blocks/OBJECT/NUMBER   the block at NUMBER x block size; OBJECT is a hash of address, size and block size
    partial/               files that are being written
    locks/                 locks of blocks, shared by many of them
    usage                  total size of all blocks in bytes
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_anymal.object_storage.file_locks import all_locked, locked

# Blocks share this many locks; two that share one are not fetched at the same time.
_LOCKS = 1024
# Share of the limit that remains after blocks were removed.
_KEPT = 0.9
# Last use of a block in nanoseconds, and its size in bytes.
_USE = np.dtype([("time", "<i8"), ("size", "<i8")])
# Age in seconds after which a file in partial/ belongs to a process that has ended.
_ABANDONED = 3600.0


@dataclass(frozen=True)
class CachedObject:
    """An object in the cache."""

    # Its folder in the cache.
    folder: Path
    # Its size in bytes.
    size: int
    # Size of its blocks in bytes; the last one is shorter.
    block: int

    def span(self, number: int) -> tuple[int, int]:
        """First byte of a block, and the byte after its last one."""
        return number * self.block, min(self.size, (number + 1) * self.block)


class BlockCache:
    """A cache of blocks with a size limit.

    Args:
        folder: folder of the cache, see `cache_folder`.
        limit: largest total size of the blocks, in bytes.
        block: size of a block in bytes.
    """

    def __init__(self, folder: Path, limit: int, block: int):
        self._folder, self._limit, self._block = folder, limit, block

    def object(self, address: str, size: int) -> CachedObject:
        """The cache's entry for an object of `size` bytes."""
        name = hashlib.sha256(f"{address}\n{size}\n{self._block}".encode()).hexdigest()[:32]
        return CachedObject(self._folder / "blocks" / name, size, self._block)

    def read(self, entry: CachedObject, number: int, start: int, stop: int) -> bytes | None:
        """The bytes [start, stop) of an object, all within block `number`; None if the cache cannot provide them."""
        first, after = entry.span(number)
        try:
            descriptor = os.open(entry.folder / str(number), os.O_RDONLY)
            try:
                complete = os.fstat(descriptor).st_size == after - first
                data = os.pread(descriptor, stop - start, start - first) if complete else b""
                # Not possible in another user's cache.
                with suppress(PermissionError):
                    os.utime(descriptor)
            finally:
                os.close(descriptor)
        # Most often: the block is not there. A disk that fails must not end a run that can do without it.
        except OSError:
            return None
        return data if len(data) == stop - start else None

    def locked(self, entry: CachedObject, numbers: Iterable[int]) -> AbstractContextManager[None]:
        """Hold the locks of blocks while they are fetched, so that no other process of the node fetches them, too."""
        names = (f"{entry.folder.name}/{number}" for number in numbers)
        return all_locked(self._folder / "locks" / f"{zlib.crc32(name.encode()) % _LOCKS:04d}" for name in names)

    def put(self, entry: CachedObject, number: int, data: bytes) -> None:
        """Add a block. A full disk, or a block larger than the cache, leaves it out."""
        with suppress(OSError):
            self.add(entry, number, data)

    def add(self, entry: CachedObject, number: int, data: bytes) -> None:
        """Add a block, unless it is larger than the cache.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if len(data) > self._limit:
            return
        partial = self._folder / "partial" / f"{entry.folder.name}-{number}-{os.getpid()}-{time.monotonic_ns()}"
        try:
            with locked(self._folder / "usage") as usage:
                for name in ("partial", "blocks"):
                    (self._folder / name).mkdir(exist_ok=True)
                used = _read_number(usage)
                if used is None or used + len(data) > self._limit:
                    used = self._evict(int(self._limit * _KEPT) - len(data))
                partial.write_bytes(data)
                # Before the block appears: after a crash in between, too much is counted until the next eviction.
                _write_number(usage, used + len(data))
                entry.folder.mkdir(exist_ok=True)
                os.replace(partial, entry.folder / str(number))
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise

    def holds(self, entry: CachedObject, number: int) -> bool:
        """Whether a block is in the cache. This is not a use of it."""
        return (entry.folder / str(number)).exists()

    def drop(self, entry: CachedObject, numbers: Iterable[int]) -> None:
        """Remove blocks. Their size is no longer counted after the next eviction."""
        for number in numbers:
            with suppress(FileNotFoundError):
                (entry.folder / str(number)).unlink()

    def _evict(self, goal: int) -> int:
        """Remove the least recently used blocks until at most `goal` bytes remain; returns how many do."""
        self._remove_abandoned()
        # 16 bytes per block: a list of all names would take hundreds of megabytes.
        rows = np.fromiter(((stat.st_mtime_ns, stat.st_size) for _, stat in self._blocks()), _USE)
        rows = rows[np.argsort(rows["time"])[::-1]]
        fits = np.cumsum(rows["size"]) <= goal
        oldest_kept = int(rows[fits][-1]["time"]) if fits.any() else np.iinfo(np.int64).max
        remaining = 0
        for path, stat in self._blocks():
            if stat.st_mtime_ns >= oldest_kept and remaining + stat.st_size <= goal:
                remaining += stat.st_size
            else:
                with suppress(FileNotFoundError):
                    os.unlink(path)
        return remaining

    def _blocks(self) -> Iterator[tuple[str, os.stat_result]]:
        """Paths and properties of all blocks; empty folders of objects are removed."""
        for folder in os.scandir(self._folder / "blocks"):
            empty = True
            for file in os.scandir(folder.path):
                empty = False
                with suppress(FileNotFoundError):
                    yield file.path, file.stat()
            if empty:
                with suppress(OSError):
                    os.rmdir(folder.path)

    def _remove_abandoned(self) -> None:
        for file in os.scandir(self._folder / "partial"):
            with suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _ABANDONED:
                    os.unlink(file.path)


def _read_number(descriptor: int) -> int | None:
    """The number in a file; None in a new or damaged one."""
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _write_number(descriptor: int, number: int) -> None:
    os.pwrite(descriptor, f"{number:<31}\n".encode(), 0)
