"""The shards of a folder, with their sizes and when they were modified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_anymal.data.records import DataError
from megatron_anymal.object_storage.client import file_system

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.Z")
# Fields by which file systems state the version of a file: object stores by a hash, others by a time.
_VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated")


@dataclass(frozen=True)
class ShardFile:
    """A shard as its file system lists it."""

    # File name.
    name: str
    # Size in bytes.
    size: int
    # Its version: when it was last modified, or a hash of its content; empty if that is not known.
    modified: str


def find_shards(folder: str) -> dict[str, ShardFile]:
    """The .tar files of a folder by name, in the order of the names.

    Raises:
        DataError: the folder does not exist or contains no shards, or some of its shards could not be read: compressed
            ones, ones in subfolders, or ones whose extension is in capitals.
        StorageError: the object store cannot be used.
    """
    fs, root = file_system(folder)
    if not fs.isdir(root):
        raise DataError(f"There is no shard folder {folder!r}. Correct the path.")
    listed = {entry["name"].rpartition("/")[2]: entry for entry in fs.ls(root, detail=True)}
    _require_readable(folder, fs, root, {name: entry["type"] for name, entry in listed.items()})
    shards = sorted(name for name, entry in listed.items() if entry["type"] != "directory" and name.endswith(".tar"))
    if not shards:
        raise DataError(f"{folder!r} contains no .tar shard.")
    # The listing has the times of links, not those of the files that they lead to.
    entries = {n: fs.info(f"{root}/{n}") if listed[n].get("islink") else listed[n] for n in shards}
    return {name: ShardFile(name, int(entry["size"] or 0), _version(entry)) for name, entry in entries.items()}


def _require_readable(folder: str, fs: Any, root: str, entries: Mapping[str, str]) -> None:
    files = sorted(name for name, kind in entries.items() if kind != "directory")
    compressed = [name for name in files if name.lower().endswith(_COMPRESSED)]
    if compressed:
        raise DataError(
            f"{folder!r} contains {len(compressed)} compressed shard(s), the first {compressed[0]!r}. Samples are read "
            "by byte range: decompress them (gunzip, zstd -d), or move them to another folder."
        )
    spelled = [name for name in files if name.lower().endswith(".tar") and not name.endswith(".tar")]
    if spelled:
        raise DataError(
            f"{folder!r} contains {spelled[0]!r}, which is not read as a shard. Rename it to end with .tar."
        )
    inside = [name for name, kind in sorted(entries.items()) if kind == "directory" and _holds_shards(fs, root, name)]
    if inside:
        raise DataError(
            f"{folder!r} contains shards in the subfolder(s) {', '.join(inside[:5])}, which the index does not cover. "
            "Index each folder separately, or move the shards up."
        )


def _holds_shards(fs: Any, root: str, name: str) -> bool:
    return any(path.endswith(".tar") for path in fs.ls(f"{root}/{name}", detail=False))


def _version(entry: Mapping[str, Any]) -> str:
    return next((str(entry[name]) for name in _VERSIONS if entry.get(name)), "")
