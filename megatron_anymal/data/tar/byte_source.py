"""Random access to a file's bytes, on a local disk or any file system supported by fsspec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


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
            return self._read(offset, length)
        self._ahead, self._start = self._read(offset, _AHEAD), offset
        return self._ahead[:length]

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        while 0 < len(data) < length:
            more = os.pread(self._descriptor, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


class FileBytes:
    """An open fsspec file."""

    def __init__(self, file: Any, size: int):
        self._file, self.size = file, size

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length), fewer if the file ends before."""
        self._file.seek(offset)
        return bytes(self._file.read(length))


def is_local(fs: Any) -> bool:
    """Whether an fsspec file system is that of this machine."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


@contextmanager
def open_bytes(fs: Any, path: str) -> Iterator[ByteSource]:
    """Open a file of an fsspec file system.

    Raises:
        OSError: it cannot be read.
    """
    if is_local(fs):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield LocalBytes(descriptor)
        finally:
            os.close(descriptor)
        return
    with fs.open(path, "rb") as file:
        yield FileBytes(file, int(fs.size(path)))
