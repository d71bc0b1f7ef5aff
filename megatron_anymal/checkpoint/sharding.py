"""Sharded model weights and optimizer state that load under any parallel layout."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from megatron_anymal import lean_imports
from megatron_anymal.checkpoint.optimizer_steps import one_step
from megatron_anymal.model.unsharded_weights import Weight, list_weights

# Python 3.12 itself leaves out a few hundred objects.
_OWN_OF_PYTHON = 1000
# Makes optimizer state loadable under any layout.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_weights(models: Iterable[nn.Module], wanted: Callable[[str, bool], bool]) -> dict[str, Any]:
    """Shards of selected weights of this rank: index of the virtual pipeline chunk -> local parameter name -> shard.

    Args:
        wanted: selects weights by their name in the whole model and whether they are trainable.
    """
    return {str(number): _shards_of(model, wanted) for number, model in enumerate(models)}


def _shards_of(model: nn.Module, wanted: Callable[[str, bool], bool]) -> dict[str, Any]:
    llama: Any = model.get_submodule("language_model")
    shards: dict[str, Any] = {}
    llama_shards: dict[str, Any] = {}
    for weight, (name, parameter) in zip(list_weights(model), model.named_parameters()):
        if not wanted(weight.name, parameter.requires_grad):
            continue
        # megatron-core's layers would treat the adapters inside them as replicated.
        if not name.startswith("language_model.") or ".lora." in name:
            shards[name] = _shard(weight)
            continue
        if not llama_shards:
            llama_shards = llama.sharded_state_dict(prefix="language_model.", metadata=dict(METADATA))
        if name in llama_shards:
            shards[name] = llama_shards[name]
    return shards


def sharded_optimizer(optimizer: Any, weights: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """megatron-core's optimizer state, in a form that loads under any layout.

    Args:
        optimizer: a MegatronOptimizer.
        weights: the result of `sharded_weights`; must include all trainable weights.
    """
    with _positions_without_padding(optimizer), _no_old_garbage(), one_step(optimizer):
        return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(METADATA))


@contextmanager
def _no_old_garbage() -> Iterator[None]:
    """Exclude all existing objects from Python's garbage collection.

    megatron-core triggers a collection, which would traverse every object of the process while training waits.
    """
    # Asked in this order: counting visits every object that is left out.
    if lean_imports.are_frozen() or gc.get_freeze_count() > _OWN_OF_PYTHON:
        # Unfreezing would include the libraries' objects again, or what a caller has frozen.
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _positions_without_padding(optimizer: Any) -> Iterator[None]:
    """Make the distributed optimizer use parameter offsets that do not count the padding of its buckets.

    megatron-core 0.16.1 gathers its buckets without the padding at their ends, but slices out the parameters at offsets
    that include it: from the second bucket on (overlapped reduction, or tied embeddings under pipeline parallelism),
    the saved state of every parameter is shifted.
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
        for buffer, index_map in zip(buffers, kept):
            buffer.param_index_map = index_map


def _shard(weight: Weight) -> ShardedTensor:
    rank = parallel_state.get_tensor_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if weight.split_dim is None:
        return ShardedTensor.from_rank_offsets(weight.name, weight.parameter, replica_id=(0, rank, replica))
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return ShardedTensor.from_rank_offsets(
        weight.name,
        weight.parameter,
        (weight.split_dim, rank, ranks),
        # The last stage's copy of tied rows is marked as shared.
        replica_id=(int(getattr(weight.parameter, "shared", False)), 0, replica),
        # The number of rows that pad a vocabulary depends on the tensor-parallel size.
        allow_shape_mismatch=weight.rows is not None,
    )
