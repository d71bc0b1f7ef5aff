"""The shards of an index, and the folder that its files are read from: on a local disk or an object store."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Optional

import fsspec

from megatron_anymal.config import StorageConfig, is_remote
from megatron_anymal.data.index_format import BOUNDS, KEYS, MEDIA_ITEMS, SAMPLES, SHARDS
from megatron_anymal.data.left_out import INDEX_FOLDER, LEDGER
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_files import ShardFiles
from megatron_anymal.object_storage.byte_ranges import ByteRange
from megatron_anymal.object_storage.errors import ObjectMissing
from megatron_anymal.object_storage.remote_shards import RemoteShards

_REQUIRED = ("index.json", SAMPLES, MEDIA_ITEMS, KEYS)
# Indexes of earlier versions lack some of them.
_OPTIONAL = (SHARDS, BOUNDS, LEDGER)
_MEND = "Restore the shard or, if it was to change, index it again (anymal prepare --rebuild --index-only)."


class StoredShards:
    """Reads byte ranges of the shards in a folder.

    Args:
        folder: a local folder or the address of one on an object store.
        storage: how a folder on an object store is read. None: the defaults.

    Raises:
        DataError: the folder is on an object store and has no index.
        StorageError: the object store, or the cache for its indexes, cannot be used.
    """

    def __init__(self, folder: str, storage: Optional[StorageConfig] = None):
        self.folder = folder
        # None: the folder is local.
        self.remote = RemoteShards(folder, storage) if is_remote(folder) else None
        # The index of an object store is copied to this machine; only its shards are read from there.
        local = self._copied_index(self.remote) if self.remote else folder
        # File system and path of the local folder that contains the index folder.
        self.fs, self.root = fsspec.core.url_to_fs(local)
        self._files = ShardFiles(self.root)

    def _copied_index(self, remote: RemoteShards) -> str:
        try:
            return str(remote.index_copy(INDEX_FOLDER, _REQUIRED, _OPTIONAL))
        except ObjectMissing as error:
            raise DataError(
                f"{self.folder!r} has no index ({error}) Create one with `anymal prepare --index-only {self.folder}`."
            ) from None

    def open(self, sizes: Mapping[str, int]) -> None:
        """Prepare to read shards.

        Args:
            sizes: name of each shard -> its size in bytes according to the index.
        """
        if self.remote:
            self.remote.open(sizes)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Sizes in bytes of those shards that exist. The folder is listed once.

        Raises:
            StorageError: the object store cannot be used.
        """
        if self.remote:
            return self.remote.client.sizes(list(names))
        listed = {entry["name"].rpartition("/")[2]: entry["size"] for entry in self.fs.ls(self.root, detail=True)}
        return {name: listed[name] for name in names if name in listed}

    def read(self, name: str, offset: int, length: int, crc: int, where: str) -> bytes:
        """The bytes [offset, offset + length) of a shard.

        Args:
            crc: CRC-32 of the bytes when they were indexed.
            where: the sample, for errors.

        Raises:
            DataError: the bytes cannot be read or differ from those that were indexed.
            StorageError: the object store cannot be used.
        """
        if self.remote:
            return self._read_remote(self.remote, self.remote.byte_range(name, offset, length), crc, where)
        try:
            data = self._files.read(name, offset, length)
        except OSError as error:
            raise DataError(f"{where}: shard {name!r} cannot be read ({error}).") from None
        if len(data) != length or zlib.crc32(data) != crc:
            raise DataError(f"{where}: its bytes in shard {name!r} differ from those indexed (damaged shard?). {_MEND}")
        return data

    @staticmethod
    def _read_remote(remote: RemoteShards, wanted: ByteRange, crc: int, where: str) -> bytes:
        try:
            data = remote.reads.read(wanted)
            if zlib.crc32(data) != crc:
                # Damaged on the way, or in the cache.
                data = remote.reads.read_again(wanted)
        except ObjectMissing as error:
            raise DataError(f"{where}: {error}") from None
        if zlib.crc32(data) != crc:
            name = remote.client.name(wanted.path)
            raise DataError(f"{where}: its bytes in {name} differ from those indexed (damaged shard?). {_MEND}")
        return data
