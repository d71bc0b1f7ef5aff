"""A non-finite gradient on one rank: all ranks skip the step, record its samples, and too many end the run."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from engine import losses, train
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import RunConfig
from megatron_anymal.parallel import initialize
from megatron_anymal.resilience import events
from megatron_anymal.resilience.exit_codes import Exit, code_of
from megatron_anymal.resilience.nonfinite import NotFinite, all_finite
from megatron_anymal.train import loop
from megatron_anymal.train.build import TrainState, build

BAD = 2


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.max_steps, config.trainer.devices = 3, 2
    config.exp_manager.checkpoint.every_n_train_steps = 0
    return config


def content(state: TrainState) -> list[Any]:
    """All weights, the optimizer's state and its step counters."""
    weights = [p.detach().clone() for model in state.models for p in model.parameters()]
    moments, counters = [], []
    for part in state.optimizer.chained_optimizers:
        if part.optimizer is not None:
            moments += [t.clone() for s in part.optimizer.state.values() for t in s.values() if hasattr(t, "clone")]
            counters += [group.get("step", 0) for group in part.optimizer.param_groups]
    return [*weights, *moments, *counters]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        bool((a == b).all()) if hasattr(a, "all") else a == b for a, b in zip(one, other)
    )


def watched(config: RunConfig) -> dict[str, Any]:
    """In a rank: train; record per step whether it was skipped and whether weights and optimizer stayed unchanged."""
    state = build(config, initialize(config))
    step, skipped, unchanged = loop.train_step, [], []

    def look(*args: Any) -> Any:
        before = content(state)
        result = step(*args)
        state.wait_for_param_gather()
        skipped.append(result.skipped)
        unchanged.append(same(before, content(state)))
        return result

    loop.train_step = look
    failure = ""
    try:
        loop.fit(state, Path(config.exp_manager.explicit_log_dir))
    except NotFinite as error:
        assert code_of(error) is Exit.NOT_FINITE
        failure = str(error)
    planner = state.train_data.planner
    plans = [planner.plan(number) for number in range(config.trainer.max_steps)]
    keys = [[planner.key(int(d), int(s)) for d, s in zip(p.dataset, p.sample)] for p in plans]
    return {"skipped": skipped, "unchanged": unchanged, "failure": failure, "keys": keys}


def listed(config: RunConfig) -> list[dict[str, Any]]:
    path = Path(config.exp_manager.explicit_log_dir) / "skipped_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def skips_on_all_ranks(config: RunConfig, by: int) -> None:
    config.resilience.faults = [f"nan:rank={by},step={BAD}"]
    for seen in run_ranks(config.trainer.devices, watched, config):
        assert seen["skipped"] == [False, True, False] and not seen["failure"]
        # A stage may have no trainable weights; if it has some, they change in all other steps.
        assert seen["unchanged"][BAD - 1] and (seen["unchanged"] in ([False, True, False], [True] * 3))
        keys = seen["keys"]
    assert listed(config) == [{"step": BAD, "samples": keys[BAD - 1]}] and len(keys[BAD - 1]) == 8
    run_dir = Path(config.exp_manager.explicit_log_dir)
    assert [(e["step"], e["samples"]) for e in events.read(run_dir) if e["kind"] == "skipped_step"] == [
        (BAD, keys[BAD - 1])
    ]
    assert len(losses(run_dir)) == 3 and all(map(math.isfinite, losses(run_dir)))


def test_one_replica(config: RunConfig) -> None:
    skips_on_all_ranks(config, by=1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp", "tp", "pp", "dp2tp2"])
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("by", [0, 1])
def test_every_layout(config: RunConfig, layout: str, distributed: bool, by: int) -> None:
    config.model.ddp.use_distributed_optimizer = distributed
    config.trainer.devices = 4 if layout == "dp2tp2" else 2
    config.model.tensor_model_parallel_size = 2 if "tp" in layout else 1
    config.model.pipeline_model_parallel_size = 2 if layout == "pp" else 1
    # With the whole Llama trainable, the second stage has trainable weights too.
    config.model.language_model.freeze = layout != "pp"
    skips_on_all_ranks(config, by)


@pytest.mark.slow
def test_bf16_with_overlapped_gathering(config: RunConfig) -> None:
    config.trainer.precision = "bf16"
    config.model.ddp.overlap_grad_reduce = config.model.ddp.overlap_param_gather = True
    skips_on_all_ranks(config, by=0)


def test_the_run_stops_where_they_do_not_cease(config: RunConfig) -> None:
    config.resilience.faults, config.resilience.max_skipped_steps = ["nan:rank=1,every=1"], 2
    for seen in run_ranks(2, watched, config):
        assert seen["skipped"] == [True, True] and seen["unchanged"] == [True, True]
        assert "resilience.max_skipped_steps=2" in seen["failure"]
        for key in seen["keys"][0] + seen["keys"][1]:
            assert key in seen["failure"]
    assert [row["step"] for row in listed(config)] == [1, 2]
    kinds = [event["kind"] for event in events.read(Path(config.exp_manager.explicit_log_dir))]
    assert kinds.count("exception") == 2 and "end" not in kinds


@pytest.mark.slow
def test_resumed_after_a_skipped_step(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.max_steps, config.resilience.max_skipped_steps = 4, 4
    config.resilience.faults = ["nan:step=2,every=1", "nan:step=3,every=1"]
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir = str(tmp_path / "whole")
    undisturbed = run_ranks(2, train, whole)[0]
    # One step per start.
    config.exp_manager.max_time_per_run = "00:00:00:00"
    for _ in range(4):
        continued = run_ranks(2, train, config)[0]
    assert continued["losses"] == undisturbed["losses"] and listed(config) == listed(whole)
    for name, weight in undisturbed["weights"].items():
        assert (continued["weights"][name] == weight).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False])
def test_they_are_counted_over_a_restart(config: RunConfig, distributed: bool) -> None:
    # With a checkpoint before the first update.
    config.model.ddp.use_distributed_optimizer = distributed
    config.resilience.faults, config.resilience.max_skipped_steps = ["nan:every=1"], 2
    config.exp_manager.max_time_per_run = "00:00:00:00"
    first = run_ranks(2, watched, config)[0]
    assert first["skipped"] == [True] and not first["failure"]
    second = run_ranks(2, watched, config)[0]
    assert second["skipped"] == [True] and "2 steps in a row" in second["failure"]


@pytest.mark.parametrize(
    ("report", "squared", "finite"),
    [
        ([1.0], 4.0, True),
        ([math.nan], 4.0, False),
        ([1.0], math.nan, False),
        ([1.0], math.inf, False),
        ([1.0], 1e39, False),
    ],
)
def test_what_counts_as_finite(report: list[float], squared: float, finite: bool) -> None:
    assert all_finite(report, squared) is finite
