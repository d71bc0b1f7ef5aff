"""Automatic recomputation: the cheapest setting that fits, the same on every rank, with bit-identical results."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import train
from ranks import run_ranks
from sizes import sizes_of
from tiny import make_config

from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.model.llama import check_model
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.memory.rank_memory import held
from megatron_anymal.model.memory.recompute import candidates, choose, repeated_share
from megatron_anymal.model.memory.sizes import LlamaSizes, Pack, PipelineChunk, Recompute, RunSizes
from megatron_anymal.parallel import initialize
from megatron_anymal.train import auto_recompute
from megatron_anymal.train.auto_recompute import fit_recompute
from megatron_anymal.train.build import build_inputs

# Llama-3 8B on two pipeline stages of two chunks each.
LLAMA_8B = LlamaSizes(
    hidden=4096,
    ffn=14336,
    heads=32,
    groups=8,
    head_size=128,
    vocabulary=128256,
    tied=False,
    tensor=1,
    context=1,
    sequence_parallel=False,
    number=2,
    trains=True,
    attention="flash_attn",
    on_cpu=False,
    matrix_number=2,
)
STAGES = tuple(
    tuple(
        PipelineChunk(tuple(range(first, first + 8)), first == 0, first == 24) for first in (8 * stage, 16 + 8 * stage)
    )
    for stage in (0, 1)
)
RUN = RunSizes(LLAMA_8B, Pack(4096, 4096, 4096, 4096), STAGES, micro_batches=8, optimizer_bytes=12, sharers=8)


def most(run: RunSizes, one: Recompute) -> int:
    return max(held(run, stage, one).total for stage in range(len(run.stages)))


def test_candidates_go_from_nothing_to_every_layer() -> None:
    recomputations = candidates(RUN)
    shares = [repeated_share(RUN, one) for one in recomputations]
    assert recomputations[0] == Recompute() and recomputations[-1] == Recompute("full", (), "block", 8)
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert {one.granularity for one in recomputations} == {"", "selective", "full"}
    assert recomputations[1] == Recompute("selective", ("core_attn",))


@pytest.mark.parametrize("attention", ["flash_attn", "transformer_engine", "sdpa"])
def test_the_cheapest_that_fits_is_chosen(attention: str) -> None:
    run = replace(RUN, llama=replace(LLAMA_8B, attention=attention))
    totals = {one: most(run, one) for one in candidates(run)}
    least = min(totals.values())
    for memory in sorted({*totals.values(), *(total - 1 for total in totals.values() if total > least)}):
        choice = choose(run, memory)
        assert totals[choice.recompute] <= memory
        # No setting with less recomputation would fit.
        share = repeated_share(run, choice.recompute)
        assert all(total > memory for one, total in totals.items() if repeated_share(run, one) < share)
        assert choice.without == totals[Recompute()]
    assert choose(run, max(totals.values())).recompute == Recompute()
    assert choose(run, least).recompute == Recompute("full", (), "block", 8)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    memory = most(RUN, Recompute("full", (), "block", 8)) - 1
    with pytest.raises(ConfigError) as refused:
        choose(RUN, memory)
    message = str(refused.value)
    stage = max((0, 1), key=lambda stage: held(RUN, stage, Recompute("full", (), "block", 8)).total)
    of = held(RUN, stage, Recompute("full", (), "block", 8))
    assert "\n" not in message and f"pipeline stage {stage} holds {of.total / 1e9:.1f} GB" in message
    for text in (f"weights {of.weights / 1e9:.1f}", f"optimizer {of.optimizer / 1e9:.1f}", "model.memory_gb"):
        assert text in message
    assert "data.seq_length" in message and "model.tensor_model_parallel_size" in message


def test_a_method_that_megatron_core_cannot_run_is_refused() -> None:
    config = RunConfig()
    config.model.recompute_granularity, config.model.recompute_num_layers = "full", 3
    config.model.language_model.config = {"num_hidden_layers": 4}
    with pytest.raises(ConfigError, match="recompute_num_layers=3 does not divide the 4 layers"):
        check_model(config.model, config.trainer.precision, read_llama_config(config.model.language_model))


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.max_steps = 2
    return config


def memory_for(config: RunConfig, wanted: Recompute) -> float:
    """Memory in GB in which a recompute setting just fits."""
    _, modalities = build_inputs(config.model, config.data)
    sizes = sizes_of(config, modalities)
    return (most(sizes, wanted) + 1) / 1e9


def choose_with(config: RunConfig, sizes: list[int]) -> Any:
    layout = initialize(config)
    auto_recompute.memory_to_fit = lambda memory_gb, devices: sizes[layout.rank]
    _, modalities = build_inputs(config.model, config.data)
    run = sizes_of(config, modalities)
    chosen, log_line = fit_recompute(config.model, config.trainer.devices, run, layout.device)
    return chosen.recompute_granularity, chosen.recompute_num_layers, log_line


def test_the_smallest_card_decides_for_every_rank(config: RunConfig) -> None:
    config.trainer.devices = config.model.pipeline_model_parallel_size = 2
    config.model.recompute_granularity = "auto"
    tight = int(1e9 * memory_for(config, Recompute("full", (), "block", 2)))
    first, second = run_ranks(2, choose_with, config, [10**12, tight])
    assert first == second and first[:2] == ("full", 2)
    assert "recompute full: block, 2 layer(s)" in first[2] and "GB without" in first[2]
    assert run_ranks(2, choose_with, config, [10**12, 10**12])[1][0] == ""


def train_and_listen(config: RunConfig) -> dict[str, Any]:
    """Train, and also return the printed output."""
    with redirect_stdout(io.StringIO()) as heard:
        results = train(config)
    return {**results, "said": heard.getvalue()}


@pytest.mark.parametrize("trains", ["frozen", "trained", "lora"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_chosen_recompute_changes_no_bit(stages: int, trains: str, config: RunConfig, tmp_path: Path) -> None:
    config.trainer.devices = config.model.pipeline_model_parallel_size = stages
    config.model.language_model.freeze = trains != "trained"
    if trains == "lora":
        config.model.lora.r, config.model.lora.dropout = 4, 0.1
    without = run_ranks(stages, train, config)[0]
    _, modalities = build_inputs(config.model, config.data)
    sizes = sizes_of(config, modalities)
    totals = {one: most(sizes, one) for one in candidates(sizes)}
    # Settings that are chosen for some memory size: no cheaper one needs as little.
    taken = [one for one in totals if choose(sizes, totals[one]).recompute == one and one.granularity]
    assert taken[-1].granularity == "full"
    for one in taken[-2:]:
        auto = copy.deepcopy(config)
        auto.model.recompute_granularity, auto.model.memory_gb = "auto", memory_for(config, one)
        auto.exp_manager.explicit_log_dir = str(tmp_path / str(one))
        results = run_ranks(stages, train_and_listen, auto)[0]
        assert results["losses"] == without["losses"]
        for name, weight in without["weights"].items():
            np.testing.assert_array_equal(results["weights"][name], weight)
        assert f"recompute {one} (" in results["said"]
