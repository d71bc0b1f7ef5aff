"""The configuration of the job that is planned: its number of GPUs, and which keys of its layout stay."""

from __future__ import annotations

import copy
from collections.abc import Collection

from megatron_anymal.config import ModelConfig, RunConfig

# Keys of `model` that the search sets.
SEARCHED = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "fp8",
    "fp8_primary_weights",
)


def with_job_size(config: RunConfig, gpus: int, node: int) -> RunConfig:
    """Return a copy of a configuration for another number of GPUs.

    Args:
        node: GPUs of a node.
    """
    result = copy.deepcopy(config)
    result.trainer.num_nodes, result.trainer.devices = -(-gpus // node), min(gpus, node)
    return result


def with_kept_layout(config: RunConfig, kept: Collection[str]) -> RunConfig:
    """Return a copy whose layout is the default one but for the kept keys and the number format.

    A configured layout need not fit the planned number of GPUs: the search replaces it.
    """
    result, default = copy.deepcopy(config), ModelConfig()
    for key in set(SEARCHED[:7]) - set(kept):
        setattr(result.model, key, getattr(default, key))
    # Means nothing without chunks, which the search may add.
    result.model.overlap_p2p_comm = (
        result.model.overlap_p2p_comm or result.model.virtual_pipeline_model_parallel_size == 1
    )
    return result
