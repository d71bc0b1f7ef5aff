"""Writing of an index from the rows of its shards, one shard at a time: memory does not grow with their number."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import IO, Any

import fsspec
import numpy as np

from megatron_anymal.data.left_out import INDEX_FOLDER
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import MEDIA, SAMPLE, IndexHeader
from megatron_anymal.data.shard_rows import HASH, ShardRows
from megatron_anymal.data.tar.byte_source import is_local


@dataclass(frozen=True)
class _Stored:
    """A shard in the spool."""

    # The rows without their tables and keys.
    rows: ShardRows
    # Where its tables begin in the file.
    offset: int
    # Number of samples, media items and bytes of keys.
    samples: int
    media: int
    key_bytes: int


class RowSpool:
    """The rows of finished shards in a file; they may be added in any order."""

    def __init__(self, file: IO[bytes]) -> None:
        """Start with an empty file."""
        self._file = file
        self._stored: dict[int, _Stored] = {}

    def add(self, number: int, rows: ShardRows) -> None:
        """Store the rows of shard `number`."""
        offset = self._file.seek(0, os.SEEK_END)
        for table in (rows.samples, rows.media, rows.key_hashes):
            self._file.write(table.tobytes())
        self._file.write(rows.keys)
        rest = replace(
            rows, samples=np.zeros(0, SAMPLE), media=np.zeros(0, MEDIA), key_hashes=np.zeros(0, HASH), keys=b""
        )
        self._stored[number] = _Stored(rest, offset, len(rows.samples), len(rows.media), len(rows.keys))

    def __iter__(self) -> Iterator[ShardRows]:
        """The rows of all shards, in the order of their numbers."""
        for number in sorted(self._stored):
            stored = self._stored[number]
            self._file.seek(stored.offset)
            samples = np.fromfile(self._file, SAMPLE, stored.samples)
            media = np.fromfile(self._file, MEDIA, stored.media)
            key_hashes = np.fromfile(self._file, HASH, stored.samples)
            keys = self._file.read(stored.key_bytes)
            yield replace(stored.rows, samples=samples, media=media, key_hashes=key_hashes, keys=keys)


@contextmanager
def open_spool(folder: str) -> Iterator[RowSpool]:
    """A spool in a temporary file, next to the index of the shards in `folder` if that is on a local disk.

    Raises:
        DataError: nothing can be written there.
    """
    fs, root = fsspec.core.url_to_fs(folder.rstrip("/"))
    inside = f"{root}/{INDEX_FOLDER}"
    with ExitStack() as stack:
        try:
            fs.makedirs(inside, exist_ok=True)
            # It has no name, so a killed process leaves nothing behind.
            file = stack.enter_context(tempfile.TemporaryFile(dir=inside if is_local(fs) else None))
        except OSError as error:
            raise DataError(f"The index of {folder!r} cannot be written ({error}). Make the folder writable.") from None
        yield RowSpool(file)


@dataclass(frozen=True)
class TableRows:
    """Consecutive rows of the tables of an index."""

    # [n] SAMPLE: one row per sample.
    samples: np.ndarray
    # [m] MEDIA: one row per media item.
    media: np.ndarray
    # Concatenated sample keys, UTF-8.
    keys: bytes


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
        if len(media):
            for column, local, together in (("kind", rows.kinds, kinds), ("extension", rows.extensions, extensions)):
                media[column] = np.array([together.index(name) for name in local], np.uint8)[media[column]]
        key_bytes, media_items = key_bytes + len(rows.keys), media_items + len(media)
        yield TableRows(samples, media, rows.keys)


def write_index(
    folder: str,
    header: IndexHeader,
    samples: int,
    media: int,
    tables: Iterable[TableRows],
    accounting: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write an index. index.json is removed first and written last, so that a partial index is never opened.

    Args:
        samples: number of samples in `tables`.
        media: number of media items in `tables`.
        tables: all rows, in order.
        accounting: further content of index.json: counts of everything that is not in the index.
    """
    fs, root = fsspec.core.url_to_fs(folder.rstrip("/"))
    inside = f"{root}/{INDEX_FOLDER}"
    fs.makedirs(inside, exist_ok=True)
    if fs.exists(f"{inside}/index.json"):
        fs.rm_file(f"{inside}/index.json")
    with ExitStack() as stack:
        names = ("samples.npy", "media.npy", "keys.bin")
        of_samples, of_media, of_keys = (stack.enter_context(fs.open(f"{inside}/{name}", "wb")) for name in names)
        _write_npy_header(of_samples, SAMPLE, samples)
        _write_npy_header(of_media, MEDIA, media)
        for rows in tables:
            of_samples.write(rows.samples.tobytes())
            of_media.write(rows.media.tobytes())
            of_keys.write(rows.keys)
    fs.pipe_file(f"{inside}/index.json", header.with_accounting(samples, media, accounting).encode())


def _write_npy_header(file: Any, table: np.dtype, rows: int) -> None:
    """Write what precedes the rows of a table in an .npy file."""
    descr = np.lib.format.dtype_to_descr(table)
    header = {"descr": descr, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)
