"""Read and write megatron-core's "torch_dist" checkpoints one tensor at a time, without process groups or a model.

Such a checkpoint is a folder with
    *.distcp       concatenated chunks of tensors, each as torch.save writes it
    .metadata      a pickle: tensor -> type, global shape, chunks; chunk -> file, offset, length
    common.pt      state that is not sharded (step, optimizer settings)
    metadata.json  name of the format
megatron-core stacks a Llama's layers: one entry per kind of weight, with the layer as its first dimension.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_anymal.checkpoint.metadata import METADATA, Chunk, read_metadata
from megatron_anymal.checkpoint.safe_loading import BACKENDS, COMMON, FORMAT
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.torch_save_format import FilePart, read_saved, saved_around
from megatron_anymal.safetensors_io import HashedFile, raw_bytes

_FORMAT = {**BACKENDS, "sharded_backend_version": 1, "common_backend_version": 1}


@dataclass(frozen=True)
class StoredFile:
    """A complete file of chunks that is synced to disk."""

    # File name.
    name: str
    # SHA-256 of the file's content, in hexadecimal.
    sha256: str
    # What the file holds, in order.
    chunks: tuple[Chunk, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> StoredFile:
        """Inverse of `to_dict`, after a round trip through JSON."""
        chunks: list[dict[str, Any]] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in chunk.items()}
            for chunk in raw["chunks"]
        ]
        return StoredFile(raw["name"], raw["sha256"], tuple(Chunk(**chunk) for chunk in chunks))


class StreamWriter:
    """Writes one file of chunks; `write_index` turns a folder of such files into a checkpoint.

    Each process of a conversion writes its own files.

    Args:
        path: the file; its name must end in .distcp.

    Raises:
        OSError: from any method, if the disk is full or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = HashedFile(path)
        self._chunks: list[Chunk] = []

    def add(self, name: str, shape: Sequence[int], offset: Sequence[int], tensor: Tensor) -> None:
        """Append a chunk.

        Args:
            name: name of the tensor it belongs to.
            shape: shape of the whole tensor.
            offset: offset of the chunk in it.
            tensor: the chunk.
        """
        self.add_values(name, tensor.dtype, shape, offset, tensor.shape, [raw_bytes(tensor)])

    def add_values(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Sequence[int],
        offset: Sequence[int],
        size: Sequence[int],
        values: Iterable[memoryview],
    ) -> None:
        """Append a chunk without holding all of it in memory.

        Args:
            size: size of the chunk in every dimension.
            values: its bytes in row-major order, in blocks; a block may be reused once the next one is requested.
        """
        assert len(shape) == len(offset) == len(size), (name, shape, offset, size)
        before, after = saved_around(dtype, tuple(size))
        begin = self._file.tell()
        self._file.write(before)
        for block in values:
            self._file.write(block)
        assert self._file.tell() - begin - len(before) == math.prod(size) * dtype.itemsize, name
        self._file.write(after)
        self._note(name, str(dtype).removeprefix("torch."), shape, offset, size, begin)

    def add_object(self, name: str, data: bytes) -> None:
        """Append an entry that is not a tensor, as returned by `StreamReader.read_object`."""
        begin = self._file.tell()
        self._file.write(data)
        self._note(name, "", (), (), (), begin)

    def close(self) -> StoredFile:
        """Finish the file and sync it to disk."""
        return StoredFile(self.path.name, self._file.close(), tuple(self._chunks))

    def abandon(self) -> None:
        """Close the file without finishing it."""
        self._file.abandon()

    def _note(self, name: str, dtype: str, shape: Any, offset: Any, size: Any, begin: int) -> None:
        length = self._file.tell() - begin
        self._chunks.append(Chunk(name, dtype, tuple(shape), tuple(offset), tuple(size), begin, length))


def write_index(folder: Path, files: Iterable[StoredFile], common: Mapping[str, Any] | bytes) -> dict[str, str]:
    """Write the index files that turn a folder of finished files into a checkpoint that megatron-core can load.

    Args:
        common: state that is not sharded, or the bytes of another checkpoint's common.pt.

    Returns:
        File name -> SHA-256 of every file.

    Raises:
        CheckpointError: the chunks of a tensor are inconsistent, or do not fill it.
    """
    files = sorted(files, key=lambda file: file.name)
    entries: dict[str, Any] = {}
    locations: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        for chunk in file.chunks:
            index = MetadataIndex(chunk.name, torch.Size(chunk.offset) if chunk.dtype else None)
            if index in locations:
                raise CheckpointError(f"{str(folder)!r}: the chunk of {chunk.name!r} at {chunk.offset} is duplicated.")
            locations[index] = _StorageInfo(file.name, chunk.begin, chunk.length)
            _add_entry(entries, chunk)
    for name, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if stored != math.prod(entry.size):
                raise CheckpointError(f"{str(folder)!r}: {stored} of {math.prod(entry.size)} values of {name!r} exist.")
    if not isinstance(common, bytes):
        buffer = io.BytesIO()
        torch.save(dict(common), buffer)
        common = buffer.getvalue()
    metadata = Metadata(entries, storage_data=locations, version=CURRENT_DCP_VERSION)
    small = {METADATA: pickle.dumps(metadata), COMMON: common, FORMAT: json.dumps(_FORMAT).encode()}
    digests = {file.name: file.sha256 for file in files}
    for name, data in small.items():
        out = HashedFile(folder / name)
        out.write(data)
        digests[name] = out.close()
    return digests


def _add_entry(entries: dict[str, Any], chunk: Chunk) -> None:
    if not chunk.dtype:
        entries[chunk.name] = BytesStorageMetadata()
        return
    dtype = getattr(torch, chunk.dtype)
    if chunk.name not in entries:
        entries[chunk.name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(chunk.shape), [])
    entry = entries[chunk.name]
    if entry.size != torch.Size(chunk.shape) or entry.properties.dtype != dtype:
        raise CheckpointError(f"The chunks of {chunk.name!r} disagree on its shape or type.")
    entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size)))


class StreamReader:
    """Reads a checkpoint's tensors by name.

    The constructor reads only `.metadata`.

    Attributes:
        tensors: name -> description of the tensor.
        objects: name -> position of entries that are not tensors.

    Raises:
        CheckpointError: the folder is not such a checkpoint, or a file is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        contents = read_metadata(folder)
        self.tensors, self.objects = contents.tensors, contents.objects

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        dtype = getattr(torch, self.tensors[name].dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def read(self, name: str, layer: Optional[int] = None) -> Tensor:
        """Read a whole tensor, or one slice of its first dimension; only the chunks needed are read.

        Peak memory is the result plus one chunk, or just the result if it is exactly one chunk.

        Returns:
            [*shape] of the tensor, or [*shape[1:]] with `layer`.

        Raises:
            CheckpointError: there is no such layer, or the chunks are unreadable, damaged or incomplete.
        """
        stored = self.tensors[name]
        shape = stored.shape
        if layer is None:
            return self.read_box(name, (0,) * len(shape), shape)
        if not 0 <= layer < shape[0]:
            raise CheckpointError(f"{str(self.folder)!r}: {name!r} has {shape[0]} layers, but no layer {layer}.")
        return self.read_box(name, (layer, *[0] * (len(shape) - 1)), (1, *shape[1:]))[0]

    def read_box(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """Read a rectangular slice of a tensor, [*size], given by its offset and size in every dimension.

        Raises:
            CheckpointError: the chunks are unreadable, damaged or incomplete.
        """
        stored = self.tensors[name]
        needed = []
        for chunk, file in zip(stored.chunks, stored.files):
            if chunk.offset == tuple(offset) and chunk.size == tuple(size):
                return self._load(name, chunk, file)
            if _overlap(offset, size, chunk.offset, chunk.size) is not None:
                needed.append((chunk, file))
        result = torch.empty(tuple(size), dtype=self.dtype(name))
        filled = 0
        for chunk, file in needed:
            both = _overlap(offset, size, chunk.offset, chunk.size)
            assert both is not None
            in_result = tuple(slice(a - o, b - o) for (a, b), o in zip(both, offset))
            in_chunk = tuple(slice(a - o, b - o) for (a, b), o in zip(both, chunk.offset))
            target = result[in_result]
            # A chunk that is a contiguous part of the result is read straight into it.
            is_whole = target.is_contiguous() and tuple(target.shape) == chunk.size
            loaded = self._load(name, chunk, file, target if is_whole else None)
            if loaded is not target:
                target.copy_(loaded[in_chunk])
            del loaded
            filled += math.prod(b - a for a, b in both)
        if filled != result.numel():
            raise CheckpointError(f"{str(self.folder)!r}: {result.numel() - filled} values of {name!r} are missing.")
        return result

    def read_object(self, name: str) -> bytes:
        """Bytes of an entry that is not a tensor.

        Raises:
            CheckpointError: the file is unreadable or truncated.
        """
        span = self.objects[name]
        return self._bytes(name, span.file, span.begin, span.length)

    def common_bytes(self) -> bytes:
        """Contents of common.pt."""
        return (self.folder / COMMON).read_bytes()

    def _load(self, name: str, chunk: Chunk, file: str, into: Optional[Tensor] = None) -> Tensor:
        try:
            with open(self.folder / file, "rb") as raw:
                return read_saved(FilePart(raw, chunk.begin, chunk.length), chunk.dtype, chunk.size, into)
        except OSError as error:
            raise CheckpointError(f"{str(self.folder / file)!r} cannot be read ({error.strerror}).") from None
        # On damaged bytes, torch's unpickler may raise any exception.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{str(self.folder / file)!r} is damaged at {name!r} ({reason}).") from None

    def _bytes(self, name: str, file: str, begin: int, length: int) -> bytes:
        try:
            with open(self.folder / file, "rb") as raw:
                raw.seek(begin)
                data = raw.read(length)
        except OSError as error:
            raise CheckpointError(f"{str(self.folder / file)!r} cannot be read ({error.strerror}).") from None
        if len(data) != length:
            raise CheckpointError(f"{str(self.folder / file)!r} ends inside {name!r}.")
        return data


def _overlap(
    offset: Sequence[int], size: Sequence[int], other_offset: Sequence[int], other_size: Sequence[int]
) -> Optional[list[tuple[int, int]]]:
    """Intersection of two boxes as (begin, end) in every dimension; None if they do not overlap."""
    both = [(max(a, c), min(a + b, c + d)) for a, b, c, d in zip(offset, size, other_offset, other_size, strict=True)]
    return both if all(begin < end for begin, end in both) else None
