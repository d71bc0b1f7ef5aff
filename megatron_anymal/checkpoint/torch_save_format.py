"""Write and read tensors in torch.save's format without holding a second copy in memory."""

from __future__ import annotations

import functools
import io
import os
from typing import IO, Any, Optional, cast

import numpy as np
import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def saved_around(dtype: torch.dtype, size: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Bytes that torch.save writes before and after the values of a contiguous tensor.

    They depend only on its type and shape. The zip format's CRC32 checksums are omitted: the manifest has a SHA-256 of
    the whole file, and torch.load does not verify them.
    """
    # Memory that is never touched is never allocated.
    tensor = torch.empty(size, dtype=dtype)
    around = _AroundTensor(tensor)
    crc32_before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, cast(IO[bytes], around))
    finally:
        torch.serialization.set_crc32_options(crc32_before)
    assert around.is_complete, (dtype, size)
    return bytes(around.before), bytes(around.after)


class _AroundTensor:
    """File object that keeps everything written to it except one tensor's values."""

    def __init__(self, tensor: Tensor) -> None:
        self.before, self.after = bytearray(), bytearray()
        self._values = (tensor.data_ptr(), tensor.nbytes)
        # An empty tensor has no values to skip.
        self.is_complete = not tensor.nbytes

    def write(self, data: Any) -> int:
        written = np.frombuffer(data, np.uint8)
        if (written.ctypes.data, written.nbytes) == self._values:
            self.is_complete = True
        else:
            (self.after if self.is_complete else self.before).extend(data)
        return written.nbytes

    def flush(self) -> None:
        """Do nothing; torch.save requires the method."""


class FilePart(io.RawIOBase):
    """A byte range of a file, presented as a file."""

    def __init__(self, file: Any, begin: int, length: int) -> None:
        self._file, self._begin, self._length = file, begin, length
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move by `offset` bytes and return the position, in bytes from the start of the range."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Position in bytes from the start of the range."""
        return self._position

    def readinto(self, target: Any) -> int:
        """Fill a buffer from the position on; return the number of bytes read, 0 at the end of the range."""
        view = memoryview(target).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        count = os.preadv(self._file.fileno(), [view[:count]], self._begin + self._position)
        self._position += count
        return count


def read_saved(part: FilePart, dtype: str, size: tuple[int, ...], into: Optional[Tensor] = None) -> Tensor:
    """Read a tensor written by torch.save: its description through torch.load, its values straight into memory.

    torch.load would also checksum the bytes, at a fraction of the disk's speed.

    Args:
        dtype: expected type, such as "bfloat16".
        size: expected shape.
        into: contiguous tensor of shape [*size] to read into; used only if the values are stored contiguously.

    Returns:
        `into`, or a new tensor, [*size].

    Raises:
        ValueError: the tensor has another type or shape.
        EOFError: the bytes end before the values.
    """
    kind = torch.load(cast(IO[bytes], part), map_location="meta", weights_only=True)
    if not isinstance(kind, Tensor) or (tuple(kind.shape), str(kind.dtype)) != (size, f"torch.{dtype}"):
        raise ValueError(f"it is not a {dtype} tensor of shape {list(size)}")
    length = kind.untyped_storage().nbytes()
    if length != kind.nbytes or not kind.is_contiguous():
        into = None
    data = torch.empty(length, dtype=torch.uint8) if into is None else into.view(-1).view(torch.uint8)
    if length:
        # PyTorchFileReader takes the current position as the start of the file.
        part.seek(0)
        archive: Any = torch._C.PyTorchFileReader(cast(IO[bytes], part))
        part.seek(archive.get_record_offset("data/0"))
    left = data.numpy().data
    while len(left):
        count = part.readinto(left)
        if not count:
            raise EOFError("it is truncated")
        left = left[count:]
    return data.view(kind.dtype).as_strided(kind.shape, kind.stride(), kind.storage_offset()) if into is None else into
