"""How often a step waits for the device does not depend on the number of layers, micro-batches or weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import make_config, make_conversations, make_shards

from benchmarks.measuring import Dispatched
from megatron_anymal.config import RunConfig
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.step import train_step


def test_reads_are_counted() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    with Dispatched() as counted:
        x.sum().item()
        float(x[0])
        x.cpu().tolist()
        x[mask] = x[mask] + 1
        bool(mask.any())
        # Filling needs no positions.
        x[mask] = 0.0
    # A mask is looked up twice: to read and to write.
    assert sum(counted.waits.values()) == 6
    assert all(line.startswith(__file__) for line in counted.waits)
    with Dispatched() as counted:
        y = x.view(2, 2).t()
        y.mul(2).add_(1)
    assert counted.operations == 2 and not counted.waits


def count(config: RunConfig, settings: Mapping[str, Any]) -> tuple[dict[str, int], int, int]:
    """In a rank: where the second step waits, its operations and its micro-batches."""
    for key, value in settings.items():
        if key == "layers":
            config.model.language_model.config["num_hidden_layers"] = value
        elif key == "seq_length":
            config.data.seq_length = value
        else:
            setattr(config.model, key, value)
    config.trainer.devices = settings.get("pipeline_model_parallel_size", 1)
    state = build(config, initialize(config))
    for number in range(2):
        plan = state.train_data.planner.plan(number)
        micro_batches = [state.train_data.reader[m] for m in plan.of_replica(0)]
        with Dispatched() as counted:
            train_step(state, plan, micro_batches)
    return dict(counted.waits), counted.operations, len(micro_batches)


@pytest.fixture(scope="module")
def pretrain(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("waits")
    return make_config(make_shards(folder / "shards", tokenizer_folder, 48), tokenizer_folder, folder / "run")


@pytest.fixture(scope="module")
def sft(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("waits_sft")
    config = make_config(make_conversations(folder / "shards", tokenizer_folder, 48), tokenizer_folder, folder / "run")
    config.job, config.model.loss_normalization = "sft", "sample"
    config.model.lora.r = 2
    return config


@pytest.mark.parametrize("job", ["pretrain", "sft"])
def test_a_step_waits_twice(job: str, request: pytest.FixtureRequest) -> None:
    """For the sums of the losses, and for the gradient norm."""
    config = request.getfixturevalue(job)
    small, larger = (
        run_ranks(1, count, config, {"layers": layers, "seq_length": length})[0]
        for layers, length in ((2, 4096), (4, 24 if job == "pretrain" else 48))
    )
    assert larger[2] >= small[2] + 2 and larger[1] > 1.5 * small[1]
    assert sum(small[0].values()) == sum(larger[0].values()) == 2, (small[0], larger[0])


def test_a_pipeline_stage_also_waits_for_unreadable_samples(pretrain: RunConfig) -> None:
    """Ranks agree on the samples that one of them could not read."""
    for length in (4096, 24):
        settings = {"pipeline_model_parallel_size": 2, "seq_length": length}
        for waits, _, _ in run_ranks(2, count, pretrain, settings):
            assert sum(waits.values()) == 3, waits
