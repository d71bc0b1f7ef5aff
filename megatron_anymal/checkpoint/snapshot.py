"""One rank's shards of a checkpoint: planned by megatron-core, copied to host memory, written to a file."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor

from megatron_anymal.checkpoint.sharding import METADATA
from megatron_anymal.checkpoint.state import content
from megatron_anymal.checkpoint.tensor_stream import StoredFile, StreamWriter


@dataclass(frozen=True)
class Snapshot:
    """Host copy of everything a rank writes; unaffected by further training."""

    # Name, shape of the whole tensor, offset of the chunk in it, the chunk.
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]
    # Name, bytes.
    objects: list[tuple[str, bytes]]
    # Serialized state that is not sharded.
    common: bytes

    def write(self, path: Path, before_each: Callable[[], None] = lambda: None) -> list[StoredFile]:
        """Write and sync this rank's file of chunks, if there is anything to write.

        Args:
            before_each: called before each chunk.

        Raises:
            OSError: the file could not be written.
        """
        if not self.chunks and not self.objects:
            return []
        file = StreamWriter(path)
        try:
            for name, shape, offset, tensor in self.chunks:
                before_each()
                file.add(name, shape, offset, tensor)
            for name, data in self.objects:
                file.add_object(name, data)
            return [file.close()]
        except BaseException as error:
            file.abandon()
            if isinstance(error, OSError) and error.errno:
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise


class Plan:
    """Plan of which rank writes which shard of a TrainState; each shard is written once. Collective.

    Only the plan is left to megatron-core, because its own save functions are not fault tolerant. They write some files
    on one rank between two collectives, so a full disk leaves the other ranks waiting. They fork writer processes: a
    killed one is waited for forever, and those of a killed run keep writing into the folder of the next run.

    Args:
        check: compare the shards of all ranks; none may be missing or duplicated. This takes as long as all the rest,
            and checking a run's first checkpoint is enough, since the shards depend only on the layout.
    """

    def __init__(self, state: Any, step: int, *, check: bool = True) -> None:
        shards = {**_without_empty(content(state, step, is_loading=False)), "content_metadata": dict(METADATA)}
        shards, self._common = save_preprocess(shards, validate_access_integrity=check)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._planner.set_up_planner(mcore_to_pyt_state_dict(by_key))
        self._items = self._planner.create_local_plan().items

    def copy(self) -> Snapshot:
        """Copy this rank's shards to host memory.

        Raises:
            MemoryError, RuntimeError: there is not enough memory.
        """
        chunks, objects = [], []
        for item in self._items:
            data, tensor_data = self._planner.resolve_data(item), item.tensor_data
            if tensor_data is None:
                objects.append((item.index.fqn, data.getvalue()))
                continue
            # Copy even on a CPU: the next step changes the tensor in place.
            tensor = data.detach().to("cpu", copy=True).view(tensor_data.chunk.sizes)
            chunks.append((item.index.fqn, tuple(tensor_data.size), tuple(tensor_data.chunk.offsets), tensor))
        common = io.BytesIO()
        torch.save(self._common, common)
        return Snapshot(chunks, objects, common.getvalue())


def _without_empty(content: dict[str, Any]) -> dict[str, Any]:
    """Drop empty sections: a stage that trains nothing has them, and megatron-core would report a rank mismatch."""
    kept = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in kept.items() if value != {}}
