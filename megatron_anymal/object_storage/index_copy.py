"""Copies of indexes on a node's local disk, which its processes map into memory together."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_anymal.object_storage.client import REQUEST_BYTES, ObjectClient
from megatron_anymal.object_storage.errors import ObjectMissing, StorageError
from megatron_anymal.object_storage.file_locks import locked

# Properties by which stores identify the version of an object: S3, GCS and HTTP servers; memory:// has `created`.
_VERSIONS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "mtime", "created")
# A copy of an earlier version is removed when it has not been used for this many seconds.
_UNUSED = 86_400.0


@dataclass(frozen=True)
class _RemoteIndex:
    """An index on an object store."""

    client: ObjectClient
    # Name of its folder in the shard folder.
    folder: str
    required: Sequence[str]
    optional: Sequence[str]

    def path(self, name: str) -> str:
        return f"{self.client.root}/{self.folder}/{name}"

    def files(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and version of each file that exists.

        Raises:
            ObjectMissing: a required file is missing.
        """
        files = {}
        for name in (*self.required, *self.optional):
            try:
                info = self.client.info(self.path(name))
            except ObjectMissing:
                if name in self.required:
                    raise
            else:
                files[name] = int(info["size"]), _version(info)
        return files

    def copy_to(self, target: Path, files: Mapping[str, tuple[int, str]]) -> None:
        """Copy the files, in the versions given, to a new folder that appears when it is complete."""
        partial = target.parents[1] / "partial" / target.name
        # Left by a process that was killed: this one holds the lock.
        shutil.rmtree(partial, ignore_errors=True)
        try:
            (partial / self.folder).mkdir(parents=True)
            for name, (size, _) in files.items():
                _download(self.client, self.path(name), size, partial / self.folder / name)
            self._check_unchanged(files)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _check_unchanged(self, files: Mapping[str, tuple[int, str]]) -> None:
        try:
            present = self.files()
        except ObjectMissing:
            present = {}
        if present != files:
            raise StorageError(
                f"{self.client.folder}: the index changed while it was copied. Start again when it is complete."
            )


def index_copy(client: ObjectClient, index: str, required: Sequence[str], optional: Sequence[str], cache: Path) -> Path:
    """Copy an index to the local disk, unless a copy of its present version is there.

    Args:
        index: name of the index folder in the shard folder.
        required: names of its files.
        optional: names of further files that may exist.
        cache: folder of the cache.

    Returns:
        A folder that contains the index folder.

    Raises:
        ObjectMissing: a required file is missing.
        StorageError: the store or the local disk cannot be used, or the index changes while it is copied.
    """
    source = _RemoteIndex(client, index, required, optional)
    files = source.files()
    address = hashlib.sha256(client.folder.encode()).hexdigest()[:24]
    version = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:24]
    copy = cache / "indexes" / f"{address}-{version}"
    try:
        with locked(cache / "locks" / f"index-{address}"):
            if not _complete(copy / index, files):
                source.copy_to(copy, files)
            os.utime(copy)
            _remove_others(copy, address)
    except OSError as error:
        raise StorageError(
            f"The index of {client.folder} cannot be copied to {str(cache)!r} ({error}). Make room there, or set "
            "data.storage.cache_folder."
        ) from None
    return copy


def _version(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def _complete(folder: Path, files: Mapping[str, tuple[int, str]]) -> bool:
    """Whether a copy has every file in its size: those who clean up temporary files may have removed some."""
    paths = {name: folder / name for name in files}
    return all(path.is_file() and path.stat().st_size == files[name][0] for name, path in paths.items())


def _download(client: ObjectClient, path: str, size: int, target: Path) -> None:
    """Copy an object, with as many requests at a time as the client has connections."""
    starts = range(0, size, REQUEST_BYTES)
    at_once = client.settings.connections
    with target.open("wb") as file:
        for group in (starts[i : i + at_once] for i in range(0, len(starts), at_once)):
            stops = (min(size, start + REQUEST_BYTES) for start in group)
            pending = [client.submit(client.cat_file, path, *span) for span in zip(group, stops)]
            for part in pending:
                file.write(part.result())
        file.flush()
        os.fsync(file.fileno())


def _remove_others(copy: Path, address: str) -> None:
    for other in copy.parent.glob(f"{address}-*"):
        with suppress(FileNotFoundError):
            if other != copy and time.time() - other.stat().st_mtime > _UNUSED:
                shutil.rmtree(other, ignore_errors=True)
