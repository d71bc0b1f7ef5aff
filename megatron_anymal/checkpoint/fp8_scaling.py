"""FP8 scaling state in checkpoints: the amax histories of delayed scaling and the scales derived from them.

Without them, a resumed run would scale its first steps differently and diverge from the original run. Current scaling
has no such state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

from megatron_anymal.model.unsharded_weights import whole_name


def sharded_scaling(models: Sequence[nn.Module]) -> dict[str, ShardedObject]:
    """State of each Transformer Engine module, by its name in the whole model.

    Transformer Engine keeps it the same on all tensor-, context- and data-parallel ranks, so any of them can save it.
    """
    return {name: _shard(name, module.get_extra_state()) for name, module in _scaled(models)}


def set_scaling(models: Sequence[nn.Module], loaded: Mapping[str, Any]) -> None:
    """Set the modules' scaling state from a checkpoint."""
    for name, module in _scaled(models):
        if name in loaded:
            module.set_extra_state(loaded[name])


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
