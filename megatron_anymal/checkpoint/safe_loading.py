"""Load a checkpoint without running code that its files may contain.

megatron-core and torch read `.metadata` and entries that are not tensors with an unrestricted unpickler, which calls
anything the file names. Every pickle of a checkpoint is therefore first read here, by an unpickler that only allows the
classes a checkpoint consists of. A pickle that passes refers to nothing else and is safe for their readers too.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_anymal.checkpoint.store import CheckpointError

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
# megatron-core's other formats have their own readers, with other pickles.
BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}

_CHECKPOINT = "torch.distributed.checkpoint"
# Everything a `.metadata` file may refer to, besides torch dtypes.
_ALLOWED = {
    *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata")),
    *((f"{_CHECKPOINT}.metadata", name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata")),
    *((f"{_CHECKPOINT}.metadata", name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta")),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    # megatron-core stores its save plans.
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # A checkpoint written by torch itself stores the name of its folder.
    ("pathlib", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of a checkpoint")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Read a checkpoint's `.metadata`.

    Raises:
        CheckpointError: it is missing or damaged, or refers to anything that is not part of a checkpoint's description,
            or to files outside the folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}).") from None
    except Exception as error:
        # A damaged pickle may raise anything.
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}). No code in it was run.") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{str(path)!r} cannot be read (it holds a {type(metadata).__name__}).")
    for info in metadata.storage_data.values():
        if PurePath(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{str(path)!r} refers to {info.relative_path!r}, a file outside the checkpoint.")
    return metadata


def load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`megatron.core.dist_checkpointing.load`, preceded by `check_pickles`. Collective.

    Args:
        wanted: a sharded state dict.

    Raises:
        CheckpointError: as `check_pickles`.
    """
    from megatron.core import dist_checkpointing

    check_pickles(folder)
    return dist_checkpointing.load(wanted, str(folder))


def check_pickles(folder: Path) -> None:
    """Refuse a checkpoint with a pickle that could run code: `.metadata`, common.pt, entries that are not tensors.

    Raises:
        CheckpointError: there is such a pickle (the message names the file and the object it refers to), a file is
            missing or damaged, or the format is not torch_dist.
    """
    _check_format(folder)
    metadata = read_metadata(folder)
    _check_data(folder / COMMON, 0, None, COMMON)
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            info = metadata.storage_data[MetadataIndex(name)]
            _check_data(folder / info.relative_path, info.offset, info.length, name)


def _check_format(folder: Path) -> None:
    try:
        content = json.loads((folder / FORMAT).read_text())
        stated = {key: content[key] for key in BACKENDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(folder / FORMAT)!r} cannot be read ({error}).") from None
    if stated != BACKENDS:
        raise CheckpointError(f"{str(folder / FORMAT)!r}: the format is {stated}; only {BACKENDS} is supported.")


def _check_data(path: Path, start: int, length: int | None, name: str) -> None:
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read() if length is None else file.read(length)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}).") from None
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch wraps its unpickler's error in advice on how to trust the file.
        text = str(error.__context__ or error)
        reason = text.splitlines()[0].partition(" Please use ")[0].rstrip(".") if text else type(error).__name__
        raise CheckpointError(
            f"{str(path)!r}: {name!r} is damaged, or holds more than data ({reason}). No code in it was run."
        ) from None
