"""What a checkpoint holds: trainable weights, optimizer and step, in megatron-core's dist_checkpointing format."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import nn

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.sharding import (
    METADATA,
    sharded_language_model,
    sharded_optimizer,
    sharded_trainable_weights,
)
from megatron_anymal.checkpoint.store import CheckpointError, Manifest


def save(state: Any, checkpoints: Path, manifest: Manifest, keep_last: int) -> Path:
    """Write a checkpoint of a TrainState and commit it; older ones go afterwards. Collective."""
    staging = store.staging_folder(checkpoints, manifest.step)
    final = store.committed_folder(checkpoints, manifest.step)
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    weights = sharded_trainable_weights(state.models)
    content = {
        "model": weights,
        "optimizer": sharded_optimizer(state.optimizer, weights, is_loading=False),
        "step": manifest.step,
    }
    # megatron-core would start a server process for a queue that only this process uses: seconds at the first save, and
    # an orphan when this process is killed.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(_without_empty(content), str(staging), content_metadata=dict(METADATA))
    dist.barrier()
    if dist.get_rank() == 0:
        store.commit(staging, final, manifest)
        store.retain(checkpoints, keep_last)
    dist.barrier()
    return final


def _without_empty(content: dict[str, Any]) -> dict[str, Any]:
    """A stage that trains nothing has empty sections; megatron-core would report that the ranks disagree."""
    kept = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in kept.items() if value != {}}


def load(state: Any, folder: Path) -> int:
    """Load weights and optimizer into a TrainState, whatever layout wrote them. Collective.

    Returns:
        The step it was saved at.
    """
    weights = sharded_trainable_weights(state.models)
    content = {
        "model": weights,
        "optimizer": sharded_optimizer(state.optimizer, weights, is_loading=True),
        "step": 0,
    }
    loaded = dist_checkpointing.load(content, str(folder))
    # A stage without trainable weights has saved nothing.
    if any(weights.values()):
        _set(state.models, loaded["model"])
        with torch.no_grad():
            state.optimizer.load_state_dict(loaded["optimizer"])
    return int(loaded["step"])


def load_trainable(models: Sequence[nn.Module], folder: Path, optimizer: Optional[Any] = None) -> list[str]:
    """Set the weights that both the models train and a checkpoint holds; others keep their values. Collective.

    Args:
        optimizer: told to copy its main weights from the new ones.

    Returns:
        The names that were not in the checkpoint.

    Raises:
        CheckpointError: it holds none of them.
    """
    return _load_some(models, sharded_trainable_weights(models), folder, optimizer)


def load_language_model(models: Sequence[nn.Module], folder: Path) -> None:
    """Set all of the Llama's weights from a checkpoint that trained them. Collective.

    Raises:
        CheckpointError: one is not in it.
    """
    missing = _load_some(models, sharded_language_model(models), folder, None)
    if missing:
        raise CheckpointError(f"{str(folder)!r} lacks {missing[0]!r} of the Llama.")


def _load_some(
    models: Sequence[nn.Module], shards: dict[str, Any], folder: Path, optimizer: Optional[Any]
) -> list[str]:
    saved = dist_checkpointing.load_tensors_metadata(str(folder))
    wanted = {
        part: {name: shard for name, shard in of_part.items() if shard.key in saved} for part, of_part in shards.items()
    }
    found = torch.tensor([sum(map(len, wanted.values()))], device=torch.device("cuda"))
    dist.all_reduce(found)
    if not int(found):
        raise CheckpointError(f"{str(folder)!r} holds none of the weights that this model asks it for.")
    _set(models, dist_checkpointing.load({"model": wanted}, str(folder)).get("model", {}))
    if optimizer is not None:
        optimizer.reload_model_params()
    return sorted(name for part, of_part in shards.items() for name in of_part.keys() - wanted[part].keys())


def _set(models: Sequence[nn.Module], tensors: dict[str, Any]) -> None:
    with torch.no_grad():
        for part, of_part in tensors.items():
            parameters = dict(models[int(part)].named_parameters())
            for name, tensor in of_part.items():
                parameters[name].copy_(tensor)
