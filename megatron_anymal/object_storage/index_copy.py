"""Copies of indexes on a node's local disk, which its processes map into memory together."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_anymal.object_storage.client import REQUEST_BYTES, ObjectClient
from megatron_anymal.object_storage.errors import ObjectMissing, StorageError
from megatron_anymal.object_storage.file_locks import locked

# Properties by which stores identify the version of an object: S3, GCS and HTTP servers; memory:// has `created`.
_VERSIONS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "mtime", "created")
# A copy of an earlier version is removed when it has not been used for this many seconds.
_UNUSED = 86_400.0


def index_copy(client: ObjectClient, index: str, required: Sequence[str], optional: Sequence[str], cache: Path) -> Path:
    """Copy an index to the local disk, unless a copy of its present version is there.

    Args:
        index: name of the index folder in the shard folder.
        required: names of its files; the first one is written last by those who write indexes.
        optional: names of further files that may exist.
        cache: folder of the cache.

    Returns:
        A folder that contains the index folder.

    Raises:
        ObjectMissing: a required file is missing.
        StorageError: the store or the local disk cannot be used, or the index changes while it is copied.
    """
    paths = {name: f"{client.root}/{index}/{name}" for name in (*required, *optional)}
    files = _files(client, paths, optional)
    address = hashlib.sha256(client.folder.encode()).hexdigest()[:24]
    copy = cache / "indexes" / f"{address}-{_version(files)}"
    try:
        with locked(cache / "locks" / f"index-{address}"):
            if not _complete(copy / index, files):
                partial = cache / "partial" / f"{copy.name}-{os.getpid()}"
                try:
                    _download_all(client, paths, files, partial / index)
                    _check_unchanged(client, paths, optional, files)
                    shutil.rmtree(copy, ignore_errors=True)
                    copy.parent.mkdir(exist_ok=True)
                    os.replace(partial, copy)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            os.utime(copy)
            _remove_others(copy, address)
    except OSError as error:
        raise StorageError(
            f"The index of {client.folder} cannot be copied to {str(cache)!r} ({error}). Make room there, or set "
            "data.storage.cache_folder."
        ) from None
    return copy


def _files(client: ObjectClient, paths: dict[str, str], optional: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Size and version of each file."""
    files = {}
    for name, path in paths.items():
        try:
            info = client.info(path)
        except ObjectMissing:
            if name in optional:
                continue
            raise
        files[name] = int(info["size"]), _tag(info)
    return files


def _tag(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def _version(files: dict[str, tuple[int, str]]) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:24]


def _complete(folder: Path, files: dict[str, tuple[int, str]]) -> bool:
    """Whether a copy has every file in its size: those who clean up temporary files may have removed some."""
    paths = {name: folder / name for name in files}
    return all(path.is_file() and path.stat().st_size == files[name][0] for name, path in paths.items())


def _check_unchanged(
    client: ObjectClient, paths: dict[str, str], optional: Sequence[str], files: dict[str, tuple[int, str]]
) -> None:
    try:
        now = _files(client, paths, optional)
    except ObjectMissing:
        now = {}
    if now != files:
        raise StorageError(f"{client.folder}: the index changed while it was copied. Start again when it is complete.")


def _download_all(client: ObjectClient, paths: dict[str, str], files: dict[str, tuple[int, str]], target: Path) -> None:
    target.mkdir(parents=True)
    for name, (size, _) in files.items():
        _download(client, paths[name], size, target / name)


def _download(client: ObjectClient, path: str, size: int, target: Path) -> None:
    """Copy an object, with as many requests at a time as the client has connections."""
    starts = range(0, size, REQUEST_BYTES)
    at_once = client.settings.connections
    with target.open("wb") as file:
        for group in (starts[i : i + at_once] for i in range(0, len(starts), at_once)):
            ranges: Iterable[tuple[int, int]] = [(start, min(size, start + REQUEST_BYTES)) for start in group]
            pending = [client.submit(client.cat_file, path, start, stop) for start, stop in ranges]
            for part in pending:
                file.write(part.result())
        file.flush()
        os.fsync(file.fileno())


def _remove_others(copy: Path, address: str) -> None:
    for other in copy.parent.glob(f"{address}-*"):
        with suppress(FileNotFoundError):
            if other != copy and time.time() - other.stat().st_mtime > _UNUSED:
                shutil.rmtree(other, ignore_errors=True)
