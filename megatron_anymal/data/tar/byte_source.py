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


# A short read that begins close to the end of the last one reads ahead (bytes).
_SHORT, _AHEAD = 2**16, 2**18


class LocalBytes:
    """A file on a local disk. Small reads that follow each other are served from one that is larger."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        # Bytes that were read ahead, and where they and the last read end.
        self._ahead, self._start, self._stop = b"", 0, 0

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length), fewer if the file ends before."""
        start = offset - self._start
        if 0 <= start <= len(self._ahead) - length:
            return self._ahead[start : start + length]
        is_near = abs(offset - self._stop) <= _SHORT
        self._stop = offset + length
        if length > _SHORT or not is_near:
            return self.read_exactly(offset, length)
        self._ahead, self._start = self.read_exactly(offset, _AHEAD), offset
        return self._ahead[:length]

    def read_exactly(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length) as `read_at`, without reading ahead: for reads in random order."""
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
