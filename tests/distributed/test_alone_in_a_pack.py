"""A document has the same loss and gradient in a pack as on its own, on 1, 2 and 4 context-parallel ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import RunConfig
from megatron_anymal.data.records import PlannedMicroBatch
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build


def losses_and_gradients(config: RunConfig, packed: bool) -> dict[int, tuple[float, dict[str, np.ndarray]]]:
    """Return, per sample of the first step, the sum of its losses and the gradient of that sum by parameter."""
    state = build(config, initialize(config))
    by_position = {}
    for plan in state.train_data.planner.plan(0).of_replica(0):
        for sample in plan.samples:
            alone = dataclasses.replace(plan, samples=(sample,), padded_length=sample.length)
            by_position[sample.position] = of_sample(state, plan if packed else alone, sample.position)
    return by_position


def of_sample(state: TrainState, plan: PlannedMicroBatch, position: int) -> tuple[float, dict[str, np.ndarray]]:
    [model] = state.models
    model.zero_grad(set_to_none=True)
    micro_batch = state.train_data.reader[plan]
    losses = model(micro_batch, labels=micro_batch.labels)
    loss = (losses * micro_batch.loss_mask * (micro_batch.sample_positions == position)).sum()
    loss.backward()
    total = loss.detach().double()
    dist.all_reduce(total)
    gradients = {}
    parameter: Any
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            dist.all_reduce(gradient)
            gradients[name] = gradient.numpy().copy()
    return float(total), gradients


@pytest.mark.parametrize("context", [1, 2, 4])
def test_a_document_in_a_pack(context: int, mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path)
    config.model.language_model.freeze = False
    alone = run_ranks(1, losses_and_gradients, config, False)[0]
    config.model.context_parallel_size = config.trainer.devices = context
    packed = run_ranks(context, losses_and_gradients, config, True)[0]
    assert packed.keys() == alone.keys() and len(packed) == config.model.global_batch_size
    for position, (loss, gradients) in packed.items():
        wanted, wanted_gradients = alone[position]
        assert loss == pytest.approx(wanted, rel=1e-5)
        whole = np.sqrt(sum(float(np.square(g).sum()) for g in wanted_gradients.values()))
        for name, gradient in gradients.items():
            difference = float(np.linalg.norm(gradient - wanted_gradients[name]))
            assert difference <= 1e-5 * whole, f"sample {position}: {name}"
