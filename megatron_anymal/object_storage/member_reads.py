"""Members of shards, requested before they are needed and read from few byte ranges."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from megatron_anymal.object_storage.block_cache import BlockCache, CachedObject
from megatron_anymal.object_storage.byte_ranges import ByteRange, coalesce, runs
from megatron_anymal.object_storage.client import REQUEST_BYTES, ObjectClient
from megatron_anymal.object_storage.errors import StorageError


class CachedReads:
    """Byte ranges of objects, through a cache of blocks.

    Args:
        client: reads the blocks that are not in the cache.
        cache: the blocks on this node's disk.
        size_of: size in bytes of the object at a path.
    """

    def __init__(self, client: ObjectClient, cache: BlockCache, size_of: Callable[[str], int]):
        self._client, self._cache, self._size_of = client, cache, size_of

    def read(self, path: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an object.

        Raises:
            StorageError: see ObjectClient.cat_file; or the cache's disk fails.
        """
        if stop <= start:
            return b""
        entry = self._entry(path)
        blocks = range(start // entry.block, (stop - 1) // entry.block + 1)
        parts = self._cached(entry, blocks, start, stop)
        # Each run is locked, so it must not be so long that another process waits for much that it does not need.
        for run in _short_runs([number for number in blocks if number not in parts], entry.block):
            try:
                with self._cache.locked(entry, run):
                    parts.update(self._cached(entry, run, start, stop))
                    for missing in runs(number for number in run if number not in parts):
                        parts.update(self._fetch(path, entry, missing, start, stop))
            except OSError as error:
                raise StorageError(
                    f"The cache in {str(entry.folder.parents[1])!r} cannot be used ({error}). Repair its disk, set "
                    "data.storage.cache_folder to another one, or data.storage.cache_gib to 0."
                ) from None
        return b"".join(parts[number] for number in blocks)

    def drop(self, path: str, start: int, stop: int) -> None:
        """Remove the blocks that hold a range from the cache."""
        entry = self._entry(path)
        self._cache.drop(entry, range(start // entry.block, max(start, stop - 1) // entry.block + 1))

    def _entry(self, path: str) -> CachedObject:
        return self._cache.object(self._client.name(path), self._size_of(path))

    def _cached(self, entry: CachedObject, numbers: Sequence[int], start: int, stop: int) -> dict[int, bytes]:
        """The parts of [start, stop) in those blocks that are in the cache."""
        cached = {}
        for number in numbers:
            first, after = entry.span(number)
            data = self._cache.read(entry, number, max(start, first), min(stop, after))
            if data is not None:
                cached[number] = data
        self._client.count("cached_blocks", len(cached))
        return cached

    def _fetch(self, path: str, entry: CachedObject, numbers: range, start: int, stop: int) -> dict[int, bytes]:
        """Read consecutive blocks with one request, add them to the cache, and return their parts of [start, stop)."""
        begin = entry.span(numbers[0])[0]
        data = self._client.cat_file(path, begin, entry.span(numbers[-1])[1])
        parts = {}
        for number in numbers:
            first, after = entry.span(number)
            self._cache.put(entry, number, data[first - begin : after - begin])
            parts[number] = data[max(start, first) - begin : min(stop, after) - begin]
        return parts


def _short_runs(numbers: Sequence[int], block: int) -> list[range]:
    """Runs of consecutive blocks, each of about one request at most."""
    most = max(1, REQUEST_BYTES // block)
    return [run[i : i + most] for run in runs(numbers) for i in range(0, len(run), most)]


@dataclass
class _Extent:
    """A byte range that was requested, in one or several requests."""

    # First byte of the range.
    start: int
    # Its bytes, REQUEST_BYTES per future.
    parts: list[Future[bytes]]

    def bytes(self, start: int, stop: int) -> bytes:
        first = (start - self.start) // REQUEST_BYTES
        last = (stop - 1 - self.start) // REQUEST_BYTES
        data = b"".join(part.result() for part in self.parts[first : last + 1])
        begin = self.start + first * REQUEST_BYTES
        return data if len(data) == stop - start else data[start - begin : stop - begin]


class MemberReads:
    """Reads ranges of objects that were requested before, or reads them now.

    Args:
        client: the folder.
        cached: reads through the cache; None: the node has none.
        gap: largest distance in bytes between ranges that share a request.
    """

    def __init__(self, client: ObjectClient, cached: CachedReads | None, gap: int):
        self._client, self._cached, self._gap = client, cached, gap
        # Range -> what holds its bytes, and by how many users it was requested.
        self._requested: dict[ByteRange, tuple[_Extent, int]] = {}
        self._pid = os.getpid()

    def request(self, ranges: Iterable[ByteRange]) -> None:
        """Start to read ranges. They stay in memory until `release`, which must follow with the same ranges."""
        if self._pid != os.getpid():
            # What another process has requested does not arrive in this one.
            self._requested, self._pid = {}, os.getpid()
        users = Counter(ranges)
        for covering, inside in coalesce([one for one in users if one not in self._requested], self._gap):
            extent = _Extent(covering.start, [self._client.submit(self._read, *part) for part in _parts(covering)])
            self._requested.update((one, (extent, 0)) for one in inside)
        for one, more in users.items():
            extent, before = self._requested[one]
            self._requested[one] = extent, before + more

    def release(self, ranges: Iterable[ByteRange]) -> None:
        """Forget ranges that were requested."""
        for one in ranges:
            extent, users = self._requested[one]
            if users > 1:
                self._requested[one] = extent, users - 1
            else:
                del self._requested[one]

    def read(self, wanted: ByteRange) -> bytes:
        """The bytes of a range.

        Raises:
            StorageError: see ObjectClient.cat_file.
        """
        self._client.count("reads")
        if wanted.stop <= wanted.start:
            return b""
        if wanted in self._requested and self._pid == os.getpid():
            return self._requested[wanted][0].bytes(wanted.start, wanted.stop)
        return self._read(wanted.path, wanted.start, wanted.stop)

    def read_again(self, wanted: ByteRange) -> bytes:
        """The bytes of a range, not from the cache or memory; the blocks in the cache are replaced.

        Raises:
            StorageError: see ObjectClient.cat_file.
        """
        self._client.count("read_again")
        if self._cached is not None:
            self._cached.drop(wanted.path, wanted.start, wanted.stop)
        return self._read(wanted.path, wanted.start, wanted.stop)

    def _read(self, path: str, start: int, stop: int) -> bytes:
        return (self._cached.read if self._cached is not None else self._client.cat_file)(path, start, stop)


def _parts(whole: ByteRange) -> list[tuple[str, int, int]]:
    starts = range(whole.start, whole.stop, REQUEST_BYTES)
    return [(whole.path, start, min(whole.stop, start + REQUEST_BYTES)) for start in starts]
