"""A run that continues with fewer or more processes reads the same samples and has the losses of an undisturbed run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import losses
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import RunConfig
from megatron_anymal.parallel import initialize
from megatron_anymal.resilience import events
from megatron_anymal.resilience.exit_codes import Exit
from megatron_anymal.train import loop
from megatron_anymal.train.build import build

STEPS = 6


@pytest.fixture(scope="module")
def config(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path_factory.mktemp("layouts") / "run")
    config.trainer.max_steps = STEPS
    return config


def taken(config: RunConfig) -> tuple[int, dict[int, set[str]]]:
    """In a rank: train; return the exit code and the samples this rank read, by step."""
    state = build(config, initialize(config))
    step, step_samples = loop.train_step, {}

    def look(state: Any, plan: Any, micro_batches: Any, coming: Any) -> Any:
        key = state.train_data.planner.key
        samples = [sample for m in micro_batches for sample in m.plan.samples]
        step_samples[plan.step] = {key(sample.dataset, sample.sample) for sample in samples}
        return step(state, plan, micro_batches, coming)

    loop.train_step = look
    return int(loop.fit(state, Path(config.exp_manager.explicit_log_dir))), step_samples


def run(config: RunConfig, layout: dict[str, int]) -> tuple[set[int], dict[int, set[str]]]:
    """Train under a layout; return the ranks' exit codes and each step's samples on all replicas."""
    config = copy.deepcopy(config)
    config.trainer.devices = layout.get("world", 1)
    config.model.tensor_model_parallel_size = layout.get("tp", 1)
    config.model.pipeline_model_parallel_size = layout.get("pp", 1)
    config.data.num_workers = layout.get("workers", 0)
    ranks = run_ranks(config.trainer.devices, taken, config)
    return {code for code, _ in ranks}, {
        n: set().union(*(step_samples[n] for _, step_samples in ranks)) for n in ranks[0][1]
    }


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[int, set[str]]]:
    config = copy.deepcopy(config)
    config.exp_manager.explicit_log_dir = str(tmp_path_factory.mktemp("whole"))
    codes, samples = run(config, {})
    assert codes == {Exit.DONE} and len(samples) == STEPS
    return losses(Path(config.exp_manager.explicit_log_dir)), samples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"world": 2, "tp": 2, "workers": 1}, {"world": 1}),
        ({"world": 2, "pp": 2}, {"world": 1, "workers": 2}),
        ({"world": 2}, {"world": 4, "workers": 1}),
        ({"world": 4, "tp": 2}, {"world": 2, "pp": 2}),
        ({"world": 4, "tp": 2}, {"world": 4, "workers": 2}),
        ({"world": 4, "pp": 2, "workers": 1}, {"world": 4, "tp": 2}),
    ],
    ids=["tp2-one", "pp2-one", "dp2-dp4", "dp2tp2-pp2", "dp2tp2-dp4", "dp2pp2-dp2tp2"],
)
def test_continued_on_other_processes(
    config: RunConfig,
    whole: tuple[list[float], dict[int, set[str]]],
    tmp_path: Path,
    first: dict[str, int],
    second: dict[str, int],
) -> None:
    config = copy.deepcopy(config)
    config.exp_manager.explicit_log_dir = str(tmp_path / "run")
    # Stopped after each step: two steps under one layout, then to the end under the other.
    limited = copy.deepcopy(config)
    limited.exp_manager.max_time_per_run = "00:00:00:00"
    samples: dict[int, set[str]] = {}
    for _ in range(2):
        codes, step_samples = run(limited, first)
        assert codes == {Exit.REQUEUE} and len(step_samples) == 1
        samples |= step_samples
    codes, step_samples = run(config, second)
    assert codes == {Exit.DONE}
    assert samples | step_samples == whole[1] and not samples.keys() & step_samples.keys()
    np.testing.assert_allclose(losses(tmp_path / "run"), whole[0], rtol=1e-5)
    assert [e["step"] for e in events.read(tmp_path / "run") if e["kind"] == "resume"] == [1, 2]
