"""Read and write safetensors files one tensor at a time, so that memory holds only the requested data.

The format: eight bytes with the header's length, the header (JSON: name -> dtype, shape, begin and end of its bytes),
then the tensors' bytes, little-endian, without gaps. The safetensors library's own reader maps a file into memory,
where pages that were read count towards the process; its writer needs all tensors at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Optional

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The longest header that the safetensors library accepts, in bytes.
_LONGEST_HEADER = 100_000_000
# One read or write system call transfers at most 2 GiB.
_PIECE = 1 << 30
# Chunk size in bytes for reading through a tensor without keeping it.
_CHECKED = 1 << 25


class TensorFileError(ValueError):
    """A tensor file cannot be used. The message names the file, the problem and the fix."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's entry in the header."""

    # Type of the elements.
    dtype: torch.dtype
    # Shape of the tensor.
    shape: tuple[int, ...]
    # Offset of its data from the beginning of the file, in bytes.
    begin: int

    @property
    def size(self) -> int:
        """Size of its data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile(Mapping[str, Tensor]):
    """A safetensors file: tensors by name, each read into new memory on access.

    Args:
        path: the file.
        offset: its beginning in a larger file, in bytes; the larger file may continue after it.

    Raises:
        TensorFileError: the file is missing, cut off, or its header is damaged.
    """

    def __init__(self, path: Path | str, offset: int = 0) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            self._size = os.fstat(self._descriptor).st_size
            self._entries, self.metadata = self._read_header(offset)
        except OSError as error:
            raise TensorFileError(f"{str(self.path)!r} cannot be read ({error.strerror}).") from None

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and size of a tensor, without its data."""
        return self._entries[name]

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor, [*shape].

        Raises:
            TensorFileError: the file cannot be read.
            KeyError: there is no such tensor.
        """
        entry = self._entries[name]
        data = torch.empty(entry.size, dtype=torch.uint8)
        self._fill(data.numpy().data, entry.begin, name)
        return data.view(entry.dtype).reshape(entry.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's values in order, as chunks [k] of some megabytes.

        Raises:
            TensorFileError: the file cannot be read.
        """
        entry = self._entries[name]
        for done in range(0, entry.size, _CHECKED):
            data = torch.empty(min(_CHECKED, entry.size - done), dtype=torch.uint8)
            self._fill(data.numpy().data, entry.begin + done, name)
            yield data.view(entry.dtype)

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` with a tensor's bytes, starting at its byte `offset`.

        Raises:
            TensorFileError: the file cannot be read.
        """
        self._fill(target, self._entries[name].begin + offset, name)

    def __contains__(self, name: object) -> bool:
        # Mapping's default implementation would read the tensor.
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Close the file; garbage collection of the object does so, too."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()

    def _fill(self, target: memoryview, begin: int, name: str) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor, [target[done : done + _PIECE]], begin + done)
            except OSError as error:
                raise self._wrong(f"{name!r} cannot be read: {error.strerror}") from None
            if not count:
                raise self._wrong(f"it ends inside {name!r}")
            done += count

    def _read_header(self, offset: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        if self._size < offset + 8:
            raise self._wrong(f"it is {self._size} bytes long, too short for a header")
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, offset))
        if length > min(_LONGEST_HEADER, self._size - offset - 8):
            raise self._wrong(f"its header would be {length} bytes long in a file of {self._size}")
        raw = bytearray(length)
        self._fill(memoryview(raw), offset + 8, "the header")
        try:
            header = json.loads(raw)
            metadata = header.pop("__metadata__", None) or {}
            parsed = {name: self._parse(name, value) for name, value in header.items()}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            if isinstance(error, TensorFileError):
                raise
            raise self._wrong(f"its header is damaged ({error!r})") from None
        start, end = offset + 8 + length, 0
        entries = {}
        for name, entry, stop in sorted(((n, e, s) for n, (e, s) in parsed.items()), key=lambda x: (x[1].begin, x[2])):
            if entry.begin != end or stop - entry.begin != entry.size:
                raise self._wrong(
                    f"its header puts {name!r} of {entry.size} bytes at {entry.begin} to {stop}, after a tensor that "
                    f"ends at {end}"
                )
            end = stop
            entries[name] = TensorEntry(entry.dtype, entry.shape, start + entry.begin)
        if start + end > self._size or (not offset and start + end != self._size):
            raise self._wrong(f"it is {self._size} bytes long and should be {start + end}")
        # In the order of the file.
        return entries, metadata

    def _parse(self, name: str, value: Any) -> tuple[TensorEntry, int]:
        if value["dtype"] not in _DTYPES:
            raise self._wrong(f"{name!r} has the unknown type {value['dtype']!r}")
        begin, stop = value["data_offsets"]
        numbers = [*value["shape"], begin, stop]
        if any(type(n) is not int or n < 0 for n in numbers):
            raise self._wrong(f"{name!r} has a shape or offset that is not a whole number: {numbers}")
        return TensorEntry(_DTYPES[value["dtype"]], tuple(value["shape"]), begin), stop

    def _wrong(self, what: str) -> TensorFileError:
        return TensorFileError(f"{str(self.path)!r} is damaged: {what}. Download or copy it again.")


class HashedFile:
    """A new file that is written sequentially and hashed (SHA-256) on the way; `close` syncs it to disk.

    Raises:
        OSError: from any method, as for any file.
    """

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "w")
        self._hash = hashlib.sha256()
        self._position = 0

    def write(self, data: Any) -> int:
        """Append bytes (any object with a buffer); large writes are hashed in parallel."""
        view = memoryview(data).cast("B")
        hashing = None
        if len(view) > 1 << 20:
            hashing = threading.Thread(target=self._hash.update, args=(view,))
            hashing.start()
        else:
            self._hash.update(view)
        try:
            done = 0
            while done < len(view):
                done += self._file.write(view[done : done + _PIECE])
        finally:
            if hashing:
                hashing.join()
        if hashing:
            # Makes the kernel start writing this to disk now instead of at the end of the file.
            os.posix_fadvise(self._file.fileno(), self._position, len(view), os.POSIX_FADV_DONTNEED)
        self._position += len(view)
        return len(view)

    def tell(self) -> int:
        """Number of bytes written."""
        return self._position

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""

    def close(self) -> str:
        """Sync the file to disk and close it.

        Returns:
            Its SHA-256.
        """
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the incomplete file without syncing it."""
        self._file.close()


class SafetensorsWriter:
    """Writes a safetensors file whose names, types and shapes are known beforehand, one tensor at a time.

    As a context manager it closes the file, with TensorFileError if tensors are missing; if the block fails, the file
    stays incomplete.

    Args:
        path: the file to write.
        entries: name -> (dtype, shape), in the order in which the tensors will be appended.
        metadata: for the header; HuggingFace's readers expect {"format": "pt"}.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, Iterable[int]]],
        metadata: Optional[Mapping[str, str]] = None,
    ) -> None:
        self.path = path
        self._left = [(name, dtype, tuple(shape)) for name, (dtype, shape) in entries.items()]
        self._left.reverse()
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        begin = 0
        for name, dtype, shape in reversed(self._left):
            end = begin + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        # Align the data to eight bytes.
        raw += b" " * (-len(raw) % 8)
        self.digest = ""
        self._file = HashedFile(path)
        self._file.write(struct.pack("<Q", len(raw)) + raw)

    def append(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, of any shape.

        Raises:
            TensorFileError: it is not the next one, or its dtype or shape is not the one in the header.
        """
        expected = self._left[-1] if self._left else None
        if expected != (name, tensor.dtype, tuple(tensor.shape)):
            raise TensorFileError(
                f"{str(self.path)!r}: the next tensor should be {expected}, not "
                f"{(name, tensor.dtype, tuple(tensor.shape))}."
            )
        self._file.write(raw_bytes(tensor))
        self._left.pop()

    def close(self) -> str:
        """Sync the file to disk and close it.

        Returns:
            Its SHA-256, which is also kept in `digest`.

        Raises:
            TensorFileError: tensors are missing.
        """
        if self._left:
            self._file.abandon()
            raise TensorFileError(f"{str(self.path)!r}: {len(self._left)} tensors were not written.")
        self.digest = self._file.close()
        return self.digest

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if kind is not None:
            self._file.abandon()
        elif not self.digest:
            self.close()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Bytes of a tensor of any shape in row-major order; not copied if the tensor is contiguous on the CPU."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
