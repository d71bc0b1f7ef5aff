"""Encoder costs are the same on every rank and at every start of a run, and change packs but never samples."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import train
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.validation import check
from megatron_anymal.data.configured_modality import integer_costs
from megatron_anymal.parallel import initialize
from megatron_anymal.train import encoder_costs
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.encoder_costs import FILE, agree_on_costs, read_costs, seconds_per_piece


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.model.optim.sched.name = "constant"
    (tmp_path / "run").mkdir()
    return config


def costs_of(state: TrainState) -> dict[str, float]:
    """Costs per piece that a planner uses, by modality."""
    return {m.name: m.cost_per_piece for m in state.train_data.planner._by_kind.values()}


def with_clock(start: int, function: Any, config: RunConfig) -> Any:
    """In a rank: call a function while the encoders take other times at every start and on every rank."""
    rank = int(os.environ.get("RANK", "0"))

    def seconds(encoder: Any, device: torch.device) -> float:
        return float(math.prod(encoder.piece_shape) ** (-1 if start else 1) * 1e-6 * (1 + rank))

    encoder_costs.seconds_per_piece = seconds
    return function(config)


def agreed(config: RunConfig) -> tuple[dict[str, float], Any, list[list[int]], list[str]]:
    """In a rank: costs, packs and samples of a plan, and the messages."""
    state, messages = build(config, initialize(config)), []
    agree_on_costs(state, Path(config.exp_manager.explicit_log_dir), messages.append)
    plan = state.train_data.planner.plan(2)
    return costs_of(state), plan.micro_batches, [plan.dataset.tolist(), plan.sample.tolist()], messages


def test_operations_are_those_of_the_encoders(config: RunConfig) -> None:
    """Ranks without encoders plan with them, too, and a trained encoder costs a backward pass more."""

    def both(config: RunConfig) -> tuple[dict[str, float], dict[str, float]]:
        state = build(config, initialize(config))
        agree_on_costs(state, Path("unused"), print)
        encoders: Any = state.models[0].encoders
        return costs_of(state), {name: encoder.flops_per_piece() for name, encoder in encoders.items()}

    config.model.pipeline_model_parallel_size = config.trainer.devices = 2
    config.model.modalities["image"].encoder.freeze = False
    (first, operations), (second, none) = run_ranks(2, both, config)
    assert none == {} and first == second
    trains = {name: not modality.encoder.freeze for name, modality in config.model.modalities.items()}
    assert set(trains.values()) == {True, False}
    assert first == {name: count * (3 if trains[name] else 1) for name, count in operations.items()}
    assert len(set(operations.values())) == 3


def test_costs_change_packs_but_not_samples(config: RunConfig) -> None:
    packs, samples = [], []
    config.model.encoder_costs = "configured"
    for costs in ((1.0, 1.0, 1000.0), (1000.0, 1.0, 1.0)):
        for modality, cost in zip(config.model.modalities.values(), costs):
            modality.cost_per_piece = cost
        check(config)
        [(modality_costs, micro_batches, batch, messages)] = run_ranks(1, agreed, config)
        assert tuple(modality_costs.values()) == costs and messages == []
        packs.append(micro_batches)
        samples.append(batch)
    assert packs[0] != packs[1] and samples[0] == samples[1]


def test_measured_costs_are_those_of_rank_0_at_the_first_start(config: RunConfig) -> None:
    config.model.encoder_costs = "measured"
    alone = copy.deepcopy(config)
    config.trainer.devices = 2
    first, other_rank = run_ranks(2, with_clock, 0, agreed, config)
    assert first[:3] == other_rank[:3]
    again, _ = run_ranks(2, with_clock, 1, agreed, config)
    assert again[:3] == first[:3]
    [other_layout] = run_ranks(1, with_clock, 1, agreed, alone)
    assert other_layout[0] == first[0] and other_layout[2] == first[2]
    for (_, _, _, messages), expected in ((first, "measured: image"), (again, f"from {FILE}: image")):
        assert len(messages) == 1 and messages[0].startswith("encoder costs") and expected in messages[0]
    # Without the file, the second start would have planned other packs.
    (Path(config.exp_manager.explicit_log_dir) / FILE).unlink()
    anew, _ = run_ranks(2, with_clock, 1, agreed, config)
    assert anew[0] != first[0] and anew[1] != first[1] and anew[2] == first[2]


def test_another_modality_is_measured_with_the_others(config: RunConfig) -> None:
    config.model.encoder_costs = "measured"
    file = Path(config.exp_manager.explicit_log_dir) / FILE
    file.write_text(json.dumps({"seconds_per_piece": {"image": 1.0}}))
    [(costs, *_)] = run_ranks(1, with_clock, 0, agreed, config)
    assert costs.keys() == {"image", "audio", "imu"} and costs == read_costs(file) and costs["image"] != 1.0


def test_a_resumed_run_has_the_same_bits(config: RunConfig, tmp_path: Path) -> None:
    """Both starts of the second run would measure other times than the first."""
    config.model.encoder_costs = "measured"
    [whole] = run_ranks(1, with_clock, 0, train, config)
    config.exp_manager.explicit_log_dir = str(tmp_path / "parts")
    for start, steps in ((0, 3), (1, 6)):
        config.trainer.max_steps = steps
        [parts] = run_ranks(1, with_clock, start, train, config)
    assert parts["losses"] == whole["losses"] and len(whole["losses"]) == 6
    for name, weight in whole["weights"].items():
        np.testing.assert_array_equal(parts["weights"][name], weight, err_msg=name)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"seconds_per_piece": {"image": -1}}', '{"seconds_per_piece": {"image": NaN}}']
)
def test_damaged_costs_are_refused(content: str, tmp_path: Path) -> None:
    assert read_costs(tmp_path / FILE) == {}
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError, match=r"encoder_costs.json' is damaged. Delete it"):
        read_costs(tmp_path / FILE)


def test_damaged_costs_are_refused_on_every_rank(config: RunConfig) -> None:
    def refused(config: RunConfig) -> str:
        with pytest.raises(ConfigError) as error:
            agreed(config)
        return str(error.value)

    config.model.encoder_costs, config.trainer.devices = "measured", 2
    (Path(config.exp_manager.explicit_log_dir) / FILE).write_text("{")
    first, second = run_ranks(2, refused, config)
    assert first == second and "is damaged" in first


def test_measuring_leaves_no_trace(config: RunConfig) -> None:
    def measured(config: RunConfig) -> list[float]:
        state = build(config, initialize(config))
        before = torch.random.get_rng_state()
        encoders: Any = state.models[0].encoders
        weights = {name: value.clone() for name, value in encoders.state_dict().items()}
        costs = [seconds_per_piece(encoder, state.layout.device) for encoder in encoders.values()]
        assert torch.equal(torch.random.get_rng_state(), before)
        for name, value in encoders.state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert not any(p.grad is not None for p in encoders.parameters())
        return costs

    [costs] = run_ranks(1, measured, config)
    assert len(costs) == 3 and all(0 < seconds < 10 for seconds in costs)


@pytest.mark.parametrize(
    ("costs", "given", "message"),
    [
        ("operations", {"image": 2.0}, r"image.cost_per_piece=2.0 has no effect with model.encoder_costs=operations"),
        ("measured", {"audio": 2.0}, r"audio.cost_per_piece=2.0 has no effect with model.encoder_costs=measured"),
        ("configured", {"image": 1.0, "audio": 2.0}, r"imu.cost_per_piece=0.0 must be above 0"),
        ("configured", {"image": -1.0}, r"image.cost_per_piece=-1.0 must be above 0"),
        ("configured", {"image": float("inf")}, r"image.cost_per_piece=inf must be above 0"),
        ("timed", {}, r"model.encoder_costs='timed'"),
    ],
)
def test_settings_without_effect_are_refused(
    config: RunConfig, costs: str, given: dict[str, float], message: str
) -> None:
    config.model.encoder_costs = costs
    for name, cost in given.items():
        config.model.modalities[name].cost_per_piece = cost
    with pytest.raises(ConfigError, match=message):
        check(config)


def test_costs_need_modalities(config: RunConfig) -> None:
    config.model.encoder_costs, config.model.modalities = "measured", {}
    with pytest.raises(ConfigError, match=r"model.encoder_costs=measured has no effect without model.modalities"):
        check(config)


def test_integer_costs() -> None:
    assert integer_costs([3.0, 1.5, 0.0]) == [2**20, 2**19, 1]
    assert integer_costs([0.0, 0.0]) == [1, 1] and integer_costs([]) == []


@pytest.mark.parametrize(("trains", "expected"), [(False, 0.25), (True, 0.75)])
def test_seconds_of_a_piece(trains: bool, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest call but the first, for each of its 8 pieces; a trained encoder takes three times as long."""
    clock = iter([0.0, 0.5, 1.0, 4.0, 5.0, 7.0, 8.0, 12.0, 13.0, 16.0, 17.0, 21.0])
    monkeypatch.setattr(encoder_costs.time, "perf_counter", lambda: next(clock))
    encoder: Any = torch.nn.Linear(3, 1).requires_grad_(trains)
    encoder.piece_shape = (3,)
    assert seconds_per_piece(encoder, torch.device("cpu")) == expected
