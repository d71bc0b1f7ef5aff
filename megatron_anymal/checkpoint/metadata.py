"""Read `.metadata`, the description of a checkpoint's contents, without torch and without running code in it.

The file is a pickle of torch's own classes. It is read by an unpickler that only allows the classes a checkpoint
consists of, and that records what the file says about each of them instead of creating one. Importing torch for its
classes would take seconds.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from megatron_anymal.checkpoint.store import CheckpointError

METADATA = ".metadata"

# Types of elements, by their names in torch -> size in bytes.
ITEM_BYTES = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}


@dataclass(frozen=True)
class Chunk:
    """A rectangular slice of a tensor, and its position in a file."""

    # Name of the tensor or other entry.
    name: str
    # Type of the elements, such as "bfloat16"; empty for an entry that is not a tensor.
    dtype: str
    # Shape of the whole tensor; empty for an entry that is not a tensor.
    shape: tuple[int, ...]
    # Offset of the chunk in every dimension of the tensor.
    offset: tuple[int, ...]
    # Size of the chunk in every dimension of the tensor.
    size: tuple[int, ...]
    # Byte offset in the file.
    begin: int
    # Length in the file, in bytes.
    length: int


@dataclass(frozen=True)
class Stored:
    """Description of a tensor in a checkpoint."""

    # Type of the elements, such as "bfloat16".
    dtype: str
    # Shape of the whole tensor.
    shape: tuple[int, ...]
    # The chunks that make up the tensor.
    chunks: tuple[Chunk, ...]
    # File name of each chunk.
    files: tuple[str, ...]

    @property
    def size(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class EntrySpan:
    """Position of an entry that is not a tensor."""

    # File name.
    file: str
    # Byte offset in the file.
    begin: int
    # Length in bytes.
    length: int


@dataclass(frozen=True)
class CheckpointContents:
    """What a checkpoint holds."""

    # Name -> description of the tensor, in the order of the names.
    tensors: dict[str, Stored]
    # Name -> position of the entries that are not tensors, in the order of the names.
    objects: dict[str, EntrySpan]


class _Recorded:
    """Stands in for a class of torch: keeps the arguments and the state that the file gives for an object of it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Metadata(_Recorded):
    pass


class _Index(_Recorded):
    pass


class _Tensor(_Recorded):
    pass


class _Bytes(_Recorded):
    pass


_CHECKPOINT = "torch.distributed.checkpoint"
# Everything a `.metadata` file may refer to, besides torch's types of elements, and what stands in for it.
ALLOWED: dict[tuple[str, str], Any] = {
    (f"{_CHECKPOINT}.metadata", "Metadata"): _Metadata,
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _Index,
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"): _Bytes,
    **{
        (f"{_CHECKPOINT}.metadata", name): _Recorded
        for name in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta")
    },
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): _Recorded,
    # megatron-core stores its save plans.
    **{
        (f"{_CHECKPOINT}.planner", name): _Recorded
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _Recorded,
    # A checkpoint written by torch itself stores the name of its folder.
    ("pathlib", "PosixPath"): _Recorded,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in ITEM_BYTES:
            return name
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of a checkpoint")
        return ALLOWED[module, name]


def read_metadata(folder: Path) -> CheckpointContents:
    """Read a checkpoint's `.metadata`.

    Raises:
        CheckpointError: it is missing or damaged, or refers to anything that is not part of a checkpoint's description,
            to files outside the folder, or to compressed tensors.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, _Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        infos = {(index["fqn"], index.get("offset")): info for index, info in _infos(metadata)}
        return _contents(metadata.state["state_dict_metadata"], infos)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r} {error}") from None
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}).") from None
    except Exception as error:
        # A damaged pickle may raise anything.
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{str(path)!r} cannot be read ({reason}). No code in it was run.") from None


def _infos(metadata: _Metadata) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Attributes of each key and value of `storage_data`."""
    for index, info in metadata.state["storage_data"].items():
        name = info.state["relative_path"]
        if PurePath(name).name != name:
            raise CheckpointError(f"refers to {name!r}, a file outside the checkpoint.")
        yield index.state, info.state


def _contents(entries: dict[str, Any], infos: dict[Any, dict[str, Any]]) -> CheckpointContents:
    tensors, objects = {}, {}
    for name, entry in sorted(entries.items()):
        if isinstance(entry, _Tensor):
            tensors[name] = _tensor(name, entry.state, infos)
        elif isinstance(entry, _Bytes):
            info = infos[name, None]
            objects[name] = EntrySpan(info["relative_path"], info["offset"], info["length"])
        else:
            raise ValueError(f"the entry {name!r} is a {type(entry).__name__}")
    return CheckpointContents(tensors, objects)


def _tensor(name: str, entry: dict[str, Any], infos: dict[Any, dict[str, Any]]) -> Stored:
    dtype, shape = entry["properties"].state[0], entry["size"]
    chunks, files = [], []
    for chunk in entry["chunks"]:
        offset, size = chunk.state["offsets"], chunk.state["sizes"]
        # Like torch's own lookup, this ignores the index of the key: a chunk is identified by its tensor and offset.
        info = infos[name, offset]
        if info.get("transform_descriptors"):
            raise CheckpointError(f"says that {name!r} is compressed, which is not supported.")
        chunks.append(Chunk(name, dtype, shape, offset, size, info["offset"], info["length"]))
        files.append(info["relative_path"])
    return Stored(dtype, shape, tuple(chunks), tuple(files))
