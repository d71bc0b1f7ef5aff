"""Checkpoints in megatron-core's "torch_dist" format read and written one tensor at a time, without processes, process
groups or a model.

Such a checkpoint is a folder with
    *.distcp       chunks of tensors one behind the other, each as torch.save writes it
    .metadata      a pickle: tensor -> type, whole shape, chunks; chunk -> file, place, length
    common.pt      what is not sharded (step, the optimizer's settings)
    metadata.json  the format's name
megatron-core keeps a Llama's layers stacked: one entry per kind of weight, the layer its first dimension.
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

from megatron_anymal.checkpoint.safe_loading import BACKENDS, COMMON, FORMAT, METADATA, read_metadata
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.torch_save_format import FilePart, read_saved, saved_around
from megatron_anymal.safetensors_io import HashedFile, raw_bytes

_FORMAT = {**BACKENDS, "sharded_backend_version": 1, "common_backend_version": 1}


@dataclass(frozen=True)
class Chunk:
    """A box cut out of a tensor, and where it is stored."""

    name: str
    # Of the tensor: its type ("bfloat16") and whole shape. Empty for an entry that is no tensor.
    dtype: str
    shape: tuple[int, ...]
    # Of the box: its first place in every dimension, and its sizes.
    offset: tuple[int, ...]
    size: tuple[int, ...]
    # Of its bytes in the file.
    place: int
    length: int


@dataclass(frozen=True)
class StoredFile:
    """A file of chunks that is whole and on disk."""

    name: str
    sha256: str
    chunks: tuple[Chunk, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> StoredFile:
        """From `to_dict`, read back from JSON."""
        chunks: list[dict[str, Any]] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in chunk.items()}
            for chunk in raw["chunks"]
        ]
        return StoredFile(raw["name"], raw["sha256"], tuple(Chunk(**chunk) for chunk in chunks))


class StreamWriter:
    """Writes one file of chunks; `write_index` makes a checkpoint of such files.

    Every process of a conversion writes files of its own. As a context manager it leaves an unfinished file where the
    block failed.

    Args:
        path: the file, its name ending in .distcp.

    Raises:
        OSError: from any method, where the disk is full or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = HashedFile(path)
        self._chunks: list[Chunk] = []

    def add(self, name: str, shape: Sequence[int], offset: Sequence[int], tensor: Tensor) -> None:
        """Append a chunk.

        Args:
            name: of the tensor it belongs to.
            shape: of that whole tensor.
            offset: where the chunk begins in it.
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
        """Append a chunk of which no more than a part is in memory.

        Args:
            size: of the chunk, in every dimension.
            values: its bytes, row by row, in parts; a part is done with when the next one is asked for.
        """
        assert len(shape) == len(offset) == len(size), (name, shape, offset, size)
        before, after = saved_around(dtype, tuple(size))
        place = self._file.tell()
        self._file.write(before)
        for part in values:
            self._file.write(part)
        assert self._file.tell() - place - len(before) == math.prod(size) * dtype.itemsize, name
        self._file.write(after)
        self._note(name, str(dtype).removeprefix("torch."), shape, offset, size, place)

    def add_object(self, name: str, data: bytes) -> None:
        """Append an entry that is no tensor, as `StreamReader.read_object` returned it."""
        place = self._file.tell()
        self._file.write(data)
        self._note(name, "", (), (), (), place)

    def close(self) -> StoredFile:
        """Put the file on disk."""
        return StoredFile(self.path.name, self._file.close(), tuple(self._chunks))

    def abandon(self) -> None:
        """Close the file unfinished."""
        self._file.abandon()

    def _note(self, name: str, dtype: str, shape: Any, offset: Any, size: Any, place: int) -> None:
        length = self._file.tell() - place
        self._chunks.append(Chunk(name, dtype, tuple(shape), tuple(offset), tuple(size), place, length))


def write_index(folder: Path, files: Iterable[StoredFile], common: Mapping[str, Any] | bytes) -> dict[str, str]:
    """Make a folder of finished files a checkpoint that megatron-core loads.

    Args:
        common: what is not sharded; or the bytes of another checkpoint's common.pt.

    Returns:
        File name -> SHA-256, of all files.

    Raises:
        CheckpointError: chunks disagree about a tensor, or do not fill it.
    """
    files = sorted(files, key=lambda file: file.name)
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        for chunk in file.chunks:
            index = MetadataIndex(chunk.name, torch.Size(chunk.offset) if chunk.dtype else None)
            if index in places:
                raise CheckpointError(f"{str(folder)!r}: the chunk of {chunk.name!r} at {chunk.offset} is doubled.")
            places[index] = _StorageInfo(file.name, chunk.place, chunk.length)
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
    metadata = Metadata(entries, storage_data=places, version=CURRENT_DCP_VERSION)
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
        raise CheckpointError(f"The chunks of {chunk.name!r} disagree about its shape or type.")
    entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size)))


@dataclass(frozen=True)
class Stored:
    """What a checkpoint says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    # Parallel to `chunks`.
    files: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class StreamReader:
    """Reads a checkpoint's tensors by name.

    Opening reads `.metadata` only.

    Attributes:
        tensors: name -> what is known of it without its data.
        objects: names of entries that are no tensors.

    Raises:
        CheckpointError: it is no such checkpoint, or a file is missing or cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = read_metadata(folder)
        # torch's own look-up ignores `index`, as this does: a chunk is known by its tensor and its first place.
        self._stored: dict[MetadataIndex, _StorageInfo] = dict(metadata.storage_data)
        self.tensors: dict[str, Stored] = {}
        self.objects: list[str] = []
        for name, entry in sorted(metadata.state_dict_metadata.items()):
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[name] = self._tensor(name, entry)
            else:
                self.objects.append(name)

    def read(self, name: str, layer: Optional[int] = None) -> Tensor:
        """A whole tensor, or one slice of its first dimension; only the chunks it needs are read.

        Peak memory is the result and one chunk, or the one chunk that is the result.
        """
        stored = self.tensors[name]
        shape = stored.shape
        if layer is None:
            return self.read_box(name, (0,) * len(shape), shape)
        if not 0 <= layer < shape[0]:
            raise CheckpointError(f"{str(self.folder)!r}: {name!r} has {shape[0]} layers, no number {layer}.")
        return self.read_box(name, (layer, *[0] * (len(shape) - 1)), (1, *shape[1:]))[0]

    def read_box(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """A box cut out of a tensor: first places and sizes in every dimension."""
        stored = self.tensors[name]
        needed = []
        for chunk, file in zip(stored.chunks, stored.files):
            if chunk.offset == tuple(offset) and chunk.size == tuple(size):
                return self._load(name, chunk, file)
            if _overlap(offset, size, chunk.offset, chunk.size) is not None:
                needed.append((chunk, file))
        result = torch.empty(tuple(size), dtype=stored.dtype)
        filled = 0
        for chunk, file in needed:
            both = _overlap(offset, size, chunk.offset, chunk.size)
            assert both is not None
            here = tuple(slice(a - o, b - o) for (a, b), o in zip(both, offset))
            there = tuple(slice(a - o, b - o) for (a, b), o in zip(both, chunk.offset))
            target = result[here]
            # A chunk that is a part of the result, row by row, needs no memory of its own.
            is_whole = target.is_contiguous() and tuple(target.shape) == chunk.size
            found = self._load(name, chunk, file, target if is_whole else None)
            if found is not target:
                target.copy_(found[there])
            del found
            filled += math.prod(b - a for a, b in both)
        if filled != result.numel():
            raise CheckpointError(f"{str(self.folder)!r} lacks {result.numel() - filled} values of {name!r}.")
        return result

    def read_object(self, name: str) -> bytes:
        """The bytes of an entry that is no tensor."""
        info = self._stored[MetadataIndex(name)]
        return self._bytes(name, info.relative_path, info.offset, info.length)

    def common_bytes(self) -> bytes:
        """The contents of common.pt."""
        return (self.folder / COMMON).read_bytes()

    def _tensor(self, name: str, entry: TensorStorageMetadata) -> Stored:
        dtype = entry.properties.dtype
        chunks, files = [], []
        for box in entry.chunks:
            info = self._stored[MetadataIndex(name, box.offsets)]
            if info.transform_descriptors:
                raise CheckpointError(f"{str(self.folder)!r}: {name!r} is stored compressed, which is not supported.")
            kind = str(dtype).removeprefix("torch.")
            sizes = tuple(entry.size), tuple(box.offsets), tuple(box.sizes)
            chunks.append(Chunk(name, kind, *sizes, info.offset, info.length))
            files.append(info.relative_path)
        return Stored(dtype, tuple(entry.size), tuple(chunks), tuple(files))

    def _load(self, name: str, chunk: Chunk, file: str, into: Optional[Tensor] = None) -> Tensor:
        try:
            with open(self.folder / file, "rb") as raw:
                return read_saved(FilePart(raw, chunk.place, chunk.length), chunk.dtype, chunk.size, into)
        except OSError as error:
            raise CheckpointError(f"{str(self.folder / file)!r} cannot be read ({error.strerror}).") from None
        # torch's unpickler fails on damaged bytes with whatever its next operation raises.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{str(self.folder / file)!r} is damaged at {name!r} ({reason}).") from None

    def _bytes(self, name: str, file: str, place: int, length: int) -> bytes:
        try:
            with open(self.folder / file, "rb") as raw:
                raw.seek(place)
                data = raw.read(length)
        except OSError as error:
            raise CheckpointError(f"{str(self.folder / file)!r} cannot be read ({error.strerror}).") from None
        if len(data) != length:
            raise CheckpointError(f"{str(self.folder / file)!r} ends inside {name!r}.")
        return data


def _overlap(
    offset: Sequence[int], size: Sequence[int], other_offset: Sequence[int], other_size: Sequence[int]
) -> Optional[list[tuple[int, int]]]:
    """Where two boxes meet, as (begin, end) in every dimension; None where they do not."""
    both = [(max(a, c), min(a + b, c + d)) for a, b, c, d in zip(offset, size, other_offset, other_size, strict=True)]
    return both if all(begin < end for begin, end in both) else None
