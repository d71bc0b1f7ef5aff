"""Trainable weights and the optimizer's state as shards that load under any layout."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Optional

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from megatron_anymal.model.unsharded_weights import list_weights

# Optimizer state that loads under any layout.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_weights(models: Iterable[nn.Module], wanted: Callable[[str, bool], bool]) -> dict[str, Any]:
    """Shards of some of this rank's weights: number of the model part -> local parameter name -> shard.

    Args:
        wanted: says of a weight, by its whole name and whether it trains, if it is one of them.
    """
    return {str(number): _shards_of(model, wanted) for number, model in enumerate(models)}


def _shards_of(model: nn.Module, wanted: Callable[[str, bool], bool]) -> dict[str, Any]:
    llama: Any = model.get_submodule("language_model")
    found: dict[str, Any] = {}
    of_llama: dict[str, Any] = {}
    for weight, (name, parameter) in zip(list_weights(model), model.named_parameters()):
        if not wanted(weight.name, parameter.requires_grad):
            continue
        # megatron-core's layers would take the adapters in them for replicated.
        if not name.startswith("language_model.") or ".lora." in name:
            found[name] = _shard(weight.name, parameter, weight.split_dim)
            continue
        if not of_llama:
            of_llama = llama.sharded_state_dict(prefix="language_model.", metadata=dict(METADATA))
        if name in of_llama:
            found[name] = of_llama[name]
    return found


def sharded_optimizer(optimizer: Any, weights: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """megatron-core's optimizer state, in the form that loads under any layout.

    Args:
        optimizer: a MegatronOptimizer.
        weights: what `sharded_weights` returned, all that trains among them.
    """
    with _places_without_padding(optimizer), _no_old_garbage():
        return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(METADATA))


@contextmanager
def _no_old_garbage() -> Iterator[None]:
    """Let Python's garbage collector pass over all that is there now.

    megatron-core calls it, and it would go through every object of the process while training waits.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _places_without_padding(optimizer: Any) -> Iterator[None]:
    """Let the distributed optimizer look parameters up where they lie once the buckets' padding is gone.

    megatron-core 0.16.1 gathers its buckets without the padding at their ends, then cuts the parameters out by their
    places with it: from the second bucket on (overlapped reduction, or a tied head under pipeline parallelism) every
    parameter's saved state is shifted.
    """
    buffers = [
        b for part in getattr(optimizer, "chained_optimizers", [optimizer]) for b in getattr(part, "buffers", [])
    ]
    kept = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        before = list(accumulate(padding, initial=0))
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, kept):
            buffer.param_index_map = places


def _shard(name: str, parameter: nn.Parameter, split_dim: Optional[int]) -> ShardedTensor:
    rank = parallel_state.get_tensor_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if split_dim is None:
        return ShardedTensor.from_rank_offsets(name, parameter, replica_id=(0, rank, replica))
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return ShardedTensor.from_rank_offsets(name, parameter, (split_dim, rank, ranks), replica_id=(0, 0, replica))
