"""The parts of a step that a run measures, with layers that take known times."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import make_config, make_shards

from megatron_anymal.config import RunConfig
from megatron_anymal.train.pass_times import PASS_METRICS

FORWARD, BACKWARD = 0.02, 0.05


def train_slowly(config: RunConfig) -> tuple[int, list[float]]:
    """Train with Llama layers that sleep; return how often they did so in a forward pass, and the seconds of this
    rank's steps without their wait for data."""
    from megatron_anymal.parallel import initialize
    from megatron_anymal.train.build import build
    from megatron_anymal.train.loop import fit
    from megatron_anymal.train.step_metrics import MetricsWindow

    state = build(config, initialize(config))

    passes, computed = [], []
    add = MetricsWindow.add

    def adding(window: MetricsWindow, seconds: float, waited: float, result: Any) -> None:
        computed.append(seconds - waited)
        add(window, seconds, waited, result)

    MetricsWindow.add = adding  # type: ignore[method-assign]

    def slow(module: Any, given: Any, output: Any) -> None:
        passes.append(module)
        time.sleep(FORWARD)
        output[0].register_hook(lambda gradient: time.sleep(BACKWARD))

    for model in state.models:
        for layer in model.language_model.decoder.layers:
            layer.register_forward_hook(slow)
    fit(state, config.run_dir)
    return len(passes), computed


@pytest.mark.parametrize("stages", [1, 2])
def test_the_parts_of_a_step(stages: int, tokenizer_folder: str, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "text", tokenizer_folder, 8, ("text",))
    config = make_config(shards, tokenizer_folder, tmp_path / "run")
    config.model.modalities, config.model.language_model.freeze = {}, False
    config.model.language_model.config["num_hidden_layers"] = 4
    config.trainer.devices = config.model.pipeline_model_parallel_size = stages
    config.data.seq_length, config.trainer.max_steps = 16, 3
    config.exp_manager.checkpoint.every_n_train_steps = 0
    # The plan is the same for every step, and so is the number of passes.
    ranks = run_ranks(stages, train_slowly, config)
    passes = sum(count for count, _ in ranks) / stages / 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row, computed in zip(rows, zip(*(seconds for _, seconds in ranks)), strict=True):
        # Of all ranks: one that another program holds up begins a step later than the others.
        assert sum(row[name] for name in PASS_METRICS) == pytest.approx(sum(computed) / stages, rel=1e-5)
        assert row["step_seconds"] * (1 - row["data_wait_share"]) == pytest.approx(computed[0], rel=1e-5)
        assert row["device_memory_gib"] == 0 and min(row[name] for name in PASS_METRICS[:-1]) >= 0
        assert row["forward_seconds"] >= passes * FORWARD and row["backward_seconds"] >= passes * BACKWARD
        if stages == 2:
            # The last stage waits for the first forward pass, the first stage for the last backward pass.
            assert row["idle_seconds"] >= 0.9 * 2 * (FORWARD + BACKWARD)
