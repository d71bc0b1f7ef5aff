"""What a step waits for: collectives and messages by kind, and reads of the device, for each job and layout.

These are the current numbers. An increase needs a reason; after a decrease, which is progress, update the number.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from ranks import run_ranks
from tiny import make_config, make_conversations, make_shards

from benchmarks.measuring import Dispatched
from megatron_anymal.config import RunConfig
from megatron_anymal.model.lora import keep_reference
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.reference_logprobs import ReferenceAnswers
from megatron_anymal.train.step import train_step

JOBS = ("pretrain", "sft", "dpo")
LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {},
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
}
# The optimizer's shards: gradients are reduced to them, weights are gathered from them. On CPUs a coalesced all-gather
# is sent as several plain ones.
SHARDS = {"reduce_scatter_tensor_coalesced": 1, "allgather_base": 1}
# Three reductions for which all ranks wait: unreadable samples; losses, stops and finite gradients; the gradient's
# norm. DPO adds the reference's log-probabilities, and under context parallelism the answers' sums of either pass.
# Under tensor parallelism most reductions are those of the projectors' layers. One gather per pass of the Llama is that
# of the last layer's input, from which it takes positions with a label; the four exchanges after it are of these alone.
EXPECTED: dict[tuple[str, str], dict[str, int]] = {
    ("pretrain", "replicas"): {**SHARDS, "allreduce": 3},
    ("sft", "replicas"): {**SHARDS, "allreduce": 3},
    ("dpo", "replicas"): {**SHARDS, "allreduce": 4},
    ("pretrain", "tensor"): {
        **SHARDS,
        "allreduce": 16,
        "allgather": 3,
        "allgather_base": 15 + 1,
        "reduce_scatter_base": 10,
    },
    ("sft", "tensor"): {**SHARDS, "allreduce": 17, "allgather": 3, "allgather_base": 23 + 1, "reduce_scatter_base": 18},
    ("dpo", "tensor"): {**SHARDS, "allreduce": 15, "allgather": 6, "allgather_base": 37 + 1, "reduce_scatter_base": 26},
    ("pretrain", "pipeline"): {**SHARDS, "allreduce": 3, "send": 1, "recv": 1},
    ("sft", "pipeline"): {**SHARDS, "allreduce": 3, "send": 1, "recv": 1},
    ("dpo", "pipeline"): {**SHARDS, "allreduce": 4, "send": 2, "recv": 1},
    # One gather of keys and values per layer and pass, one of all modalities' soft tokens; back, one scatter for each.
    ("pretrain", "context"): {**SHARDS, "allreduce": 3, "allgather_base": 3 + 1, "reduce_scatter_base": 3},
    ("sft", "context"): {**SHARDS, "allreduce": 3, "allgather_base": 3 + 1, "reduce_scatter_base": 3},
    ("dpo", "context"): {**SHARDS, "allreduce": 6, "allgather_base": 6 + 1, "reduce_scatter_base": 2},
}
# The last stage has nothing that trains, or receives as many messages as the first one sends.
OF_LAST_STAGE = {
    "pretrain": {"allreduce": 3, "send": 1, "recv": 1},
    "dpo": {"allreduce": 4, "send": 1, "recv": 2, **SHARDS},
}


@pytest.fixture(scope="module")
def configs(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """A run of each job: two layers, and packs that take all samples of a replica."""
    folder = tmp_path_factory.mktemp("collectives")
    runs = {}
    for job in JOBS:
        data = folder / job
        if job == "pretrain":
            shards = make_shards(data, tokenizer_folder, 48)
        else:
            shards = make_conversations(data, tokenizer_folder, 48, pairs=job == "dpo")
        config = make_config(shards, tokenizer_folder, folder / f"{job}_run")
        config.job, config.data.seq_length = job, 4096
        config.model.language_model.config["num_hidden_layers"] = 2
        config.model.lora.r = 0 if job == "pretrain" else 2
        runs[job] = config
    runs["dpo"].model.restore_from_path = str(folder)
    for modality in runs["dpo"].model.modalities.values():
        modality.projector.freeze = modality.encoder.freeze = True
    return runs


def second_step(config: RunConfig) -> tuple[dict[str, int], dict[str, int], int]:
    """In a rank: collectives of the second step, where it waited for the device, and its micro-batches."""
    state = build(config, initialize(config))
    if config.job == "dpo":
        keep_reference(state.models)
        state.reference = ReferenceAnswers(None, [], state.layout.device)
    for number in range(2):
        plan = state.train_data.planner.plan(number)
        micro_batches = [state.train_data.reader[m] for m in plan.of_replica(state.layout.data_rank)]
        with Dispatched() as counted:
            train_step(state, plan, micro_batches)
    # megatron-core compares states of the CPU's random numbers, which no device holds.
    waits = {line: number for line, number in counted.waits.items() if "tensor_parallel/random.py" not in line}
    return dict(counted.collectives), waits, len(micro_batches)


def configured(config: RunConfig, layout: str) -> RunConfig:
    config = copy.deepcopy(config)
    config.trainer.devices = 2
    for key, value in LAYOUTS[layout].items():
        setattr(config.model, key, value)
    return config


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_collectives_and_waits(job: str, layout: str, configs: dict[str, RunConfig]) -> None:
    counts = run_ranks(2, second_step, configured(configs[job], layout))
    expected = EXPECTED[job, layout]
    of_last = OF_LAST_STAGE.get(job, expected) if layout == "pipeline" else expected
    for (collectives, waits, micro_batches), wanted in zip(counts, (expected, of_last)):
        assert collectives == wanted and micro_batches == 1
        # For unreadable samples, the sums of the losses and the gradient's norm.
        assert sum(waits.values()) == 3, waits


def test_more_micro_batches_need_no_more_of_them(configs: dict[str, RunConfig]) -> None:
    """Replicas meet at the beginning and the end of a step only."""
    config = configured(configs["sft"], "replicas")
    config.data.seq_length = 48
    for collectives, waits, micro_batches in run_ranks(2, second_step, config):
        assert collectives == EXPECTED["sft", "replicas"] and sum(waits.values()) == 3 and micro_batches > 1


def test_a_process_alone_waits_for_losses_and_norm(configs: dict[str, RunConfig]) -> None:
    for job in JOBS:
        [(collectives, waits, _)] = run_ranks(1, second_step, configs[job])
        # megatron-core reduces over a single rank as well.
        assert collectives == {"allreduce": 1, **SHARDS} and sum(waits.values()) == 2, (job, waits)
