"""One rank's part of a checkpoint: planned by megatron-core, copied to host memory, written to a file."""

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
    """What a rank writes; nothing in it changes while training goes on."""

    # Name, shape of the whole tensor, where the chunk begins in it, the chunk.
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]
    # Name, bytes.
    objects: list[tuple[str, bytes]]
    # What is not sharded, as bytes.
    common: bytes

    def write(self, path: Path, before_each: Callable[[], None] = lambda: None) -> list[StoredFile]:
        """Write this rank's file of chunks, if there is anything to write, and put it on disk.

        Args:
            before_each: called before each chunk.

        Raises:
            OSError: it could not be written.
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
    """What each rank writes of a TrainState, each shard once. Collective.

    Args:
        check: compare all ranks' shards: none may be missing or doubled. It takes as long as all else, and what a run's
            first checkpoint was found to be, the later ones are too: shards follow from the layout.

    megatron-core decides that, and nothing more: its own saving does not survive faults. It writes some files on one
    rank between two collectives, where a full disk leaves the others waiting; its writers are forked, and one that is
    killed is waited for without end, while those of a run that was killed write on into the folder of the next.
    """

    def __init__(self, state: Any, step: int, *, check: bool = True) -> None:
        shards = {**_without_empty(content(state, step, is_loading=False)), "content_metadata": dict(METADATA)}
        shards, self._common = save_preprocess(shards, validate_access_integrity=check)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._planner.set_up_planner(mcore_to_pyt_state_dict(by_key))
        self._items = self._planner.create_local_plan().items

    def copy(self) -> Snapshot:
        """Copy this rank's part to host memory.

        Raises:
            MemoryError, RuntimeError: there is not enough.
        """
        chunks, objects = [], []
        for item in self._items:
            data, where = self._planner.resolve_data(item), item.tensor_data
            if where is None:
                objects.append((item.index.fqn, data.getvalue()))
                continue
            # On a CPU too: the next step changes it in place.
            tensor = data.detach().to("cpu", copy=True).view(where.chunk.sizes)
            chunks.append((item.index.fqn, tuple(where.size), tuple(where.chunk.offsets), tensor))
        common = io.BytesIO()
        torch.save(self._common, common)
        return Snapshot(chunks, objects, common.getvalue())


def _without_empty(content: dict[str, Any]) -> dict[str, Any]:
    """A stage that trains nothing has empty sections; megatron-core would report that the ranks disagree."""
    kept = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in kept.items() if value != {}}
