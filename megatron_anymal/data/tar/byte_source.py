"""Random access to a file's bytes, on a local disk or an object store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from megatron_anymal.object_storage.client import ObjectClient
from megatron_anymal.object_storage.sequential import SequentialBytes


class ByteSource(Protocol):
    """Random access to a file's bytes."""

    size: int

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length), fewer if the file ends before."""


class LocalBytes:
    """A file on a local disk, read without buffering or read-ahead."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length), fewer if the file ends before."""
        data = os.pread(self._descriptor, length, offset)
        while 0 < len(data) < length:
            more = os.pread(self._descriptor, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


def is_local(fs: Any) -> bool:
    """Whether a file system is that of this machine; see `file_system`."""
    return not isinstance(fs, ObjectClient)


@contextmanager
def open_bytes(fs: Any, path: str) -> Iterator[ByteSource]:
    """Open a file.

    Args:
        fs: its file system, see `file_system`.

    Raises:
        OSError: it cannot be read from the local disk.
        StorageError: it cannot be read from the object store.
    """
    if isinstance(fs, ObjectClient):
        yield SequentialBytes(fs, path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield LocalBytes(descriptor)
    finally:
        os.close(descriptor)
