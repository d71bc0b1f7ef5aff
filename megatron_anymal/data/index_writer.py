"""Writing of an index from the rows of its shards, one shard at a time: memory does not grow with their number."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import IO, Any, Optional

import numpy as np

from megatron_anymal.data.index_format import (
    BOUNDS,
    KEYS,
    MEDIA,
    MEDIA_ITEMS,
    SAMPLE,
    SAMPLES,
    SHARDS,
    IndexHeader,
)
from megatron_anymal.data.left_out import INDEX_FOLDER
from megatron_anymal.data.length_bounds import BLOCK, BoundsBuilder
from megatron_anymal.data.records import SAMPLE_KINDS, DataError
from megatron_anymal.data.shard_rows import ShardRows
from megatron_anymal.data.stored_rows import accounting, read_rows, write_rows
from megatron_anymal.data.tar.byte_source import is_local
from megatron_anymal.object_storage.client import file_system


class RowSpool:
    """The rows of finished shards in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        """Start with an empty file."""
        self._file = file
        self._offsets: dict[str, int] = {}
        self._entries: dict[str, Mapping[str, Any]] = {}

    def add(self, rows: ShardRows) -> None:
        """Store the rows of a shard."""
        self._offsets[rows.name] = self._file.seek(0, os.SEEK_END)
        self._entries[rows.name] = accounting(rows)
        write_rows(self._file, rows, {})

    def __contains__(self, name: str) -> bool:
        """Whether it has the rows of a shard."""
        return name in self._offsets

    def entry(self, name: str) -> Mapping[str, Any]:
        """Accounting of a shard."""
        return self._entries[name]

    def rows(self, name: str) -> ShardRows:
        """The rows of a shard; the caller may change the arrays.

        Raises:
            DataError: the file has been damaged.
        """
        self._file.seek(self._offsets[name])
        return read_rows(self._file, "the temporary file of the index")


@contextmanager
def open_spool(folder: str) -> Iterator[RowSpool]:
    """A spool in a temporary file, next to the index of the shards in `folder` if that is on a local disk.

    Raises:
        DataError: nothing can be written there.
        StorageError: nothing can be written to the object store.
    """
    with ExitStack() as stack:
        try:
            # It has no name, so a killed process leaves nothing behind.
            file = stack.enter_context(tempfile.TemporaryFile(dir=local_folder(folder)))
        except OSError as error:
            raise DataError(f"The index of {folder!r} cannot be written ({error}). Make the folder writable.") from None
        yield RowSpool(file)


def local_folder(folder: str) -> Optional[str]:
    """The folder of the index of the shards in `folder`, which is created; None if it is not on a local disk.

    Raises:
        OSError: it cannot be created.
        StorageError: nothing can be written to the object store.
    """
    fs, root = file_system(folder)
    inside = f"{root}/{INDEX_FOLDER}"
    fs.makedirs(inside, exist_ok=True)
    return inside if is_local(fs) else None


@dataclass(frozen=True)
class TableRows:
    """What a shard adds to the files of an index."""

    # [n] SAMPLE: one row per sample.
    samples: np.ndarray
    # [m] MEDIA: one row per media item.
    media: np.ndarray
    # Concatenated sample keys, UTF-8.
    keys: bytes
    # `accounting` of the shard.
    shard: Mapping[str, Any]


def join_shards(shards: Iterable[ShardRows], kinds: Sequence[str], extensions: Sequence[str]) -> Iterator[TableRows]:
    """The rows of each shard as they stand in the index. The arrays of `shards` are changed.

    Args:
        kinds: kinds of media of all shards; the column `kind` of the media holds positions in this list.
        extensions: likewise their file extensions.
    """
    key_bytes = media_items = 0
    for number, rows in enumerate(shards):
        samples, media = rows.samples, rows.media
        samples["shard"] = number
        samples["key_offset"] += key_bytes
        samples["media_start"] += media_items
        renumber(media, "kind", rows.kinds, kinds)
        renumber(media, "extension", rows.extensions, extensions)
        key_bytes, media_items = key_bytes + len(rows.keys), media_items + len(media)
        yield TableRows(samples, media, rows.keys, accounting(rows))


def renumber(media: np.ndarray, column: str, old: Sequence[str], new: Sequence[str]) -> None:
    """Replace positions in the list `old` by positions in the list `new`.

    Args:
        media: [m] MEDIA, changed in place.
        column: "kind" or "extension".
    """
    if len(media):
        positions = {name: position for position, name in enumerate(new)}
        # Names that `new` lacks do not occur in the rows.
        media[column] = np.array([positions.get(name, 0) for name in old], np.uint8)[media[column]]


@dataclass
class _Counts:
    """Numbers of samples and media items by kind."""

    kinds: Sequence[str]
    samples: np.ndarray = field(default_factory=lambda: np.zeros(len(SAMPLE_KINDS), np.int64))
    media: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))

    def add(self, rows: TableRows) -> None:
        self.samples += np.bincount(rows.samples["kind"], minlength=len(self.samples))
        self.media += np.bincount(rows.media["kind"], minlength=len(self.media))

    def to_json(self) -> dict[str, Any]:
        named = {"samples": zip(SAMPLE_KINDS, self.samples), "media": zip(self.kinds, self.media)}
        counts = {what: {name: int(count) for name, count in pairs if count} for what, pairs in named.items()}
        return {**counts, "block": BLOCK}


def write_index(
    folder: str,
    header: IndexHeader,
    samples: int,
    media: int,
    tables: Iterable[TableRows],
    accounting: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write an index. An older one is replaced at the end; index.json is removed before that and written last, so that
    a partial index is never opened.

    Args:
        samples: number of samples in `tables`.
        media: number of media items in `tables`.
        tables: all rows, in order.
        accounting: further content of index.json: counts of everything that is not in the index.

    Raises:
        StorageError: the object store cannot be used.
    """
    fs, root = file_system(folder)
    inside = f"{root}/{INDEX_FOLDER}"
    fs.makedirs(inside, exist_ok=True)
    counts, bounds = _Counts(header.kinds), BoundsBuilder(len(header.kinds))
    hashes = [hashlib.sha256() for _ in range(3)]
    with ExitStack() as stack:
        names = (SHARDS, SAMPLES, MEDIA_ITEMS, KEYS, BOUNDS)
        files = [stack.enter_context(replacing(fs, f"{inside}/{name}")) for name in names]
        of_shards, of_samples, of_media, of_keys, of_bounds = files
        _write_npy_header(of_samples, SAMPLE, samples)
        _write_npy_header(of_media, MEDIA, media)
        for rows in tables:
            counts.add(rows)
            bounds.add(rows.samples, rows.media)
            of_shards.write(json.dumps(rows.shard).encode() + b"\n")
            contents = (rows.samples.tobytes(), rows.media.tobytes(), rows.keys)
            for file, one, data in zip((of_samples, of_media, of_keys), hashes, contents):
                file.write(data)
                one.update(data)
        table = bounds.table()
        _write_npy_header(of_bounds, table.dtype, len(table))
        of_bounds.write(table.tobytes())
        if fs.exists(f"{inside}/index.json"):
            fs.rm_file(f"{inside}/index.json")
    with replacing(fs, f"{inside}/index.json") as file:
        content = hashlib.sha256(b"".join(one.digest() for one in hashes)).hexdigest()
        more = {**accounting, "counts": counts.to_json(), "content": content}
        file.write(header.with_accounting(samples, media, more).encode())


@contextmanager
def replacing(fs: Any, path: str) -> Iterator[IO[bytes]]:
    """A new file that replaces the one at `path` when it is complete, as object stores do by themselves.

    Raises:
        OSError: it cannot be written.
        StorageError: it cannot be written to the object store.
    """
    if not is_local(fs):
        with fs.open(path, "wb") as file:
            yield file
        return
    # A process on another machine may be writing the same file.
    part = f"{path}.{secrets.token_hex(6)}.part"
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


def _write_npy_header(file: Any, table: np.dtype, rows: int) -> None:
    """Write what precedes the rows of a table in an .npy file."""
    descr = np.lib.format.dtype_to_descr(table)
    header = {"descr": descr, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)
