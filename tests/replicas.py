"""The data path of one data-parallel replica, in this process and without a job."""

from __future__ import annotations

import copy

import torch

from megatron_anymal.config import RunConfig
from megatron_anymal.parallel import ParallelLayout
from megatron_anymal.train.build import DataSource, build_data, build_inputs


def replica_data(
    config: RunConfig,
    size: int = 1,
    *,
    tensor_rank: int = 0,
    tensor_size: int = 1,
    context_rank: int = 0,
    context_size: int = 1,
    stage: int = 0,
    stages: int = 1,
) -> DataSource:
    """Training data source as a rank in a job of `size` replicas reads it."""
    config = copy.deepcopy(config)
    config.trainer.devices = size * tensor_size * context_size * stages
    config.model.pipeline_model_parallel_size = stages
    config.model.tensor_model_parallel_size = tensor_size
    config.model.context_parallel_size = context_size
    layout = ParallelLayout(
        device=torch.device("cpu"),
        rank=0,
        world_size=size * tensor_size * context_size * stages,
        tensor_rank=tensor_rank,
        tensor_size=tensor_size,
        pipeline_rank=stage,
        pipeline_size=stages,
        data_rank=0,
        data_size=size,
        context_rank=context_rank,
        context_size=context_size,
    )
    tokenizer, modalities = build_inputs(config.model, config.data)
    vocab_size = config.model.language_model.config.get("vocab_size", 0)
    return build_data(config, layout, tokenizer, modalities, "train", vocab_size=vocab_size)
