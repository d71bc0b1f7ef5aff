"""Trainable weights as megatron-core's sharded tensors, so that a checkpoint loads under any layout."""

from __future__ import annotations

from typing import Any, Optional

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from megatron_anymal.model.weights import list_weights


def sharded_trainable_weights(model: nn.Module, metadata: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    """Local parameter name -> its shard, for what trains in this rank's part of an AnyMALModel."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, Any] = {}
    llama: Any = model.get_submodule("language_model")
    if any(name.startswith("language_model.") for name in trainable):
        shards = llama.sharded_state_dict(prefix="language_model.", metadata=metadata)
        found = {name: shard for name, shard in shards.items() if name in trainable}
    for weight, (name, parameter) in zip(list_weights(model), model.named_parameters()):
        if name in trainable and not name.startswith("language_model."):
            found[name] = _shard(weight.name, parameter, weight.split_dim)
    return found


def _shard(name: str, parameter: nn.Parameter, split_dim: Optional[int]) -> ShardedTensor:
    rank = parallel_state.get_tensor_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if split_dim is None:
        return ShardedTensor.from_rank_offsets(name, parameter, replica_id=(0, rank, replica))
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return ShardedTensor.from_rank_offsets(name, parameter, (split_dim, rank, ranks), replica_id=(0, 0, replica))
