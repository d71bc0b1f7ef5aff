"""FP8 scaling state in checkpoints: the amax histories of delayed scaling and the scales derived from them.

Without them, a resumed run would scale its first steps differently and diverge from the original run. Current scaling
has no such state.

Transformer Engine exports and imports a module's state and its recipe as one pickle, and unpickles it without
restriction. A checkpoint stores the data alone, and the recipe is that of the run which loads it, so nothing from the
file is unpickled, and a checkpoint names no classes of other packages.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.fp4_utils import get_fp4_recipe
from megatron.core.fp8_utils import get_fp8_recipe
from torch import Tensor, nn

from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.model.unsharded_weights import whole_name

_RECIPE = "recipe"


def sharded_scaling(models: Sequence[nn.Module]) -> dict[str, ShardedObject]:
    """State of each Transformer Engine module, by its name in the whole model.

    Transformer Engine keeps it the same on all tensor-, context- and data-parallel ranks, so any of them can save it.
    """
    return {name: _shard(name, _data(module.get_extra_state())) for name, module in _scaled(models)}


def set_scaling(models: Sequence[nn.Module], loaded: Mapping[str, Any]) -> None:
    """Set the modules' scaling state from a checkpoint.

    Raises:
        CheckpointError: a state is not data, as this trainer stores it.
    """
    for name, module in _scaled(models):
        state = loaded.get(name)
        if state is not None and not isinstance(state, dict):
            raise CheckpointError(
                f"The checkpoint's {name!r} is {type(state).__name__} instead of named data, and is not read: it could "
                "be a pickle that runs code. Start from the checkpoint with model.restore_from_path, which leaves FP8 "
                "scaling out."
            )
        if state:
            module.set_extra_state(_pickled({**state, _RECIPE: _recipe(module.config)}))


def _recipe(config: Any) -> Any:
    """Transformer Engine's recipe of a module's TransformerConfig."""
    return get_fp4_recipe(config) if config.fp4 else get_fp8_recipe(config)


def _data(state: Tensor) -> dict[str, Any]:
    """A module's state, [bytes] of uint8, without its recipe; empty if the module has not computed in FP8."""
    return {key: value for key, value in _unpickled(state).items() if key != _RECIPE} if state.numel() else {}


def _unpickled(state: Tensor) -> dict[str, Any]:
    """Read what this process's Transformer Engine has pickled."""
    content: dict[str, Any] = pickle.loads(state.numpy().tobytes())
    return content


def _pickled(content: dict[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def _scaled(models: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    for model in models:
        for name, module in model.named_modules():
            # Transformer Engine modules keep their scaling state in fp8_meta.
            if name.startswith("language_model.") and hasattr(module, "fp8_meta"):
                yield f"{whole_name(model, name)}.fp8_scaling", module


def _shard(name: str, state: Any) -> ShardedObject:
    others = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject(name, state, (1,), (0,), replica_id=(0, *others))
