"""The folder in which the parts of an indexing leave their rows: a file per shard, and a mark per finished part."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import IO, Any, Optional

from megatron_anymal.data.index_writer import replacing
from megatron_anymal.data.left_out import INDEX_FOLDER
from megatron_anymal.data.packing_journal import PackedShard
from megatron_anymal.data.part_of import PartOf
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_listing import ShardFile
from megatron_anymal.data.shard_rows import ShardRows
from megatron_anymal.data.stored_rows import read_head, read_rows, write_rows
from megatron_anymal.data.tar.byte_source import is_local
from megatron_anymal.object_storage.client import file_system

PARTS_FOLDER = "parts"
_MARK = "part-"
# What parts that pack a source must agree on.
_MANIFEST = "manifest.json"
_PACKED = "packed-"
# The entries of a head that are kept in memory.
_KEPT = ("bytes", "modified", "samples", "text_with_media", "options", "unreadable")


def digest(identity: Mapping[str, Any]) -> str:
    """Hash of the options of an index."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class PartFiles:
    """The files of all parts, next to the index of the shards in a folder.

    Every method may raise a StorageError if the folder is on an object store.
    """

    def __init__(self, folder: str):
        """Nothing is read or created yet."""
        self._folder = folder
        self._fs, root = file_system(folder)
        self._root = f"{root}/{INDEX_FOLDER}/{PARTS_FOLDER}"
        self._heads: dict[str, Mapping[str, Any]] = {}

    def create(self) -> None:
        """Create the folder if there is none.

        Raises:
            DataError: nothing can be written there.
        """
        try:
            self._fs.makedirs(self._root, exist_ok=True)
        except OSError as error:
            reason = f"The index of {self._folder!r} cannot be written ({error}). Make the folder writable."
            raise DataError(reason) from None

    def store(self, rows: ShardRows, options: str) -> None:
        """Store the rows of a shard.

        Args:
            options: `digest` of the options.
        """
        unreadable = any(one.code == "unreadable" for one in rows.left_out)
        notes = {"options": options, "unreadable": unreadable}
        with replacing(self._fs, self._path(rows.name)) as file:
            write_rows(file, rows, notes)

    def entry(self, name: str) -> Mapping[str, Any]:
        """The head of a shard's rows: _KEPT.

        Raises:
            DataError: there are no rows, or they are damaged.
        """
        if name not in self._heads:
            if not self._fs.exists(self._path(name)):
                raise DataError(f"No part has the rows of shard {name!r}.")
            with self._opened(name) as file:
                head = read_head(file, self._path(name))
            self._heads[name] = {key: head[key] for key in _KEPT}
        return self._heads[name]

    def rows(self, name: str) -> ShardRows:
        """The rows of a shard; the caller may change the arrays.

        Raises:
            DataError: they are damaged.
        """
        with self._opened(name) as file:
            return read_rows(file, self._path(name))

    def current(self, file: ShardFile, options: str) -> bool:
        """Whether there are rows of a shard as it is now, made with these options."""
        with suppress(DataError):
            head = self.entry(file.name)
            return bool((head["bytes"], head["modified"], head["options"]) == (file.size, file.modified, options))
        return False

    def complete(self, file: ShardFile, options: str) -> bool:
        """Whether these rows need not be read again. A shard that could not be read is tried again."""
        return self.current(file, options) and not self._heads[file.name]["unreadable"]

    def mark(self, part: PartOf, identity: Mapping[str, Any], shards: int) -> None:
        """Note that a part is finished.

        Args:
            identity: `IndexOptions.identity` of its rows.
            shards: number of shards that the part takes.
        """
        self._write(_mark(part), {"part": part.number, "of": part.of, "shards": shards, "options": dict(identity)})

    def unmark(self, part: PartOf) -> None:
        """Remove the mark of a part that is to be made again."""
        path = f"{self._root}/{_mark(part)}"
        if self._fs.exists(path):
            self._fs.rm_file(path)

    def marks(self) -> dict[PartOf, Mapping[str, Any]]:
        """What `mark` has noted of each finished part, in the order of their numbers.

        Raises:
            DataError: naming the file that is damaged.
        """
        marks = {}
        for path in sorted(self._paths()):
            if not fnmatchcase(path.rpartition("/")[2], f"{_MARK}*.json"):
                continue
            try:
                mark = json.loads(self._fs.cat_file(path))
                marks[PartOf(mark["part"], mark["of"])] = mark
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path!r} is damaged. Remove it, and run its part again.") from None
        return marks

    def manifest(self) -> Optional[dict[str, Any]]:
        """What `set_manifest` has noted; None if the shards are not made by the parts."""
        path = f"{self._root}/{_MANIFEST}"
        return dict(json.loads(self._fs.cat_file(path))) if self._fs.exists(path) else None

    def set_manifest(self, note: Mapping[str, Any]) -> None:
        """Note what parts that pack a source must agree on, as JSON values."""
        self._write(_MANIFEST, note)

    def packed(self, number: int) -> Optional[PackedShard]:
        """What `set_packed` has noted of a shard; None if it is not packed yet."""
        path = f"{self._root}/{_PACKED}{number:06d}.json"
        return PackedShard.of_line(self._fs.cat_file(path)) if self._fs.exists(path) else None

    def set_packed(self, shard: PackedShard) -> None:
        """Note a shard that a part has packed."""
        with replacing(self._fs, f"{self._root}/{_PACKED}{shard.number:06d}.json") as file:
            file.write(shard.to_line().encode())

    def remove(self) -> None:
        """Remove all files."""
        for path in self._paths():
            self._fs.rm_file(path)
        if is_local(self._fs):
            self._fs.rmdir(self._root)

    def _paths(self) -> list[str]:
        return list(self._fs.ls(self._root, detail=False)) if self._fs.isdir(self._root) else []

    def _opened(self, name: str) -> IO[bytes]:
        # From a local file, the head can be read without the rest.
        return open(self._path(name), "rb") if is_local(self._fs) else io.BytesIO(self._fs.cat_file(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}.rows"

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        with replacing(self._fs, f"{self._root}/{name}") as file:
            file.write(json.dumps(value, indent=1).encode())


def _mark(part: PartOf) -> str:
    return f"{_MARK}{part.number:09d}-of-{part.of:09d}.json"
