"""A folder of shards and their index on an object store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

from megatron_anymal.config import StorageConfig
from megatron_anymal.object_storage.block_cache import BlockCache
from megatron_anymal.object_storage.byte_ranges import ByteRange
from megatron_anymal.object_storage.cache_folder import cache_folder
from megatron_anymal.object_storage.client import ObjectClient
from megatron_anymal.object_storage.index_copy import index_copy
from megatron_anymal.object_storage.member_reads import CachedReads, MemberReads


class RemoteShards:
    """Shards on an object store, and a local copy of their index.

    Args:
        folder: the address.
        settings: data.storage; None: its defaults.

    Raises:
        StorageError: the address, the store or the cache's folder cannot be used.
    """

    def __init__(self, folder: str, settings: Optional[StorageConfig] = None):
        self.client = ObjectClient(folder, settings)
        self.settings = self.client.settings
        self._cache = cache_folder(self.settings.cache_folder)
        self._sizes: Mapping[str, int] = {}
        self._reads: Optional[MemberReads] = None

    def index_copy(self, index: str, required: Sequence[str], optional: Sequence[str]) -> Path:
        """Copy the index, with the arguments of `index_copy.index_copy`.

        Raises:
            ObjectMissing: a required file is missing.
            StorageError: see `index_copy.index_copy`.
        """
        return index_copy(self.client, index, required, optional, self._cache)

    def open(self, sizes: Mapping[str, int]) -> None:
        """Prepare to read shards.

        Args:
            sizes: name of each shard -> its size in bytes.
        """
        self._sizes = {self._path(name): size for name, size in sizes.items()}
        limit, block = int(self.settings.cache_gib * 2**30), self.settings.cache_block_kib * 2**10
        cache = BlockCache(self._cache, limit, block) if limit else None
        cached = CachedReads(self.client, cache, self._sizes.__getitem__) if cache else None
        self._reads = MemberReads(self.client, cached, self.settings.gap_kib * 2**10)

    @property
    def reads(self) -> MemberReads:
        """Reads the members of the shards."""
        assert self._reads is not None, "open() comes first"
        return self._reads

    def byte_range(self, shard: str, start: int, length: int) -> ByteRange:
        """The bytes [start, start + length) of a shard."""
        return ByteRange(self._path(shard), start, start + length)

    def _path(self, shard: str) -> str:
        return f"{self.client.root}/{shard}"
