"""Runs over the border of two stages: killed and continued bit for bit, and the same under every layout."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import losses, train
from ranks import run_ranks, start_ranks
from tiny import make_config, make_shards

from megatron_anymal.config import ConfigError, DatasetConfig, RunConfig, StageConfig
from megatron_anymal.config.validation import check

STEPS, BORDER = 6, 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> dict[str, DatasetConfig]:
    root = tmp_path_factory.mktemp("staged")
    pictures = make_shards(root / "pictures", tokenizer_folder, 20, ("image", "mixed"), seed=1)
    return {
        "pictures": DatasetConfig(pictures),
        "words": DatasetConfig(make_shards(root / "words", tokenizer_folder, 24, ("text",), seed=2)),
    }


def staged(folders: dict[str, DatasetConfig], tokenizer: str, run_dir: Path, world: int = 1) -> RunConfig:
    """Six steps: three with pictures mainly, and three with text mainly, by tokens. A loader process plans ahead of the
    border."""
    config = make_config("", tokenizer, run_dir)
    config.data.train = dict(folders)
    config.data.schedule = [
        StageConfig("first", BORDER, {"pictures": 3, "words": 1}),
        StageConfig("second", 0, {"pictures": 1, "words": 4}, "token"),
    ]
    config.data.num_workers, config.data.prefetch_steps = 1, 4
    config.trainer.max_steps, config.trainer.devices = STEPS, world
    config.exp_manager.checkpoint.every_n_train_steps, config.exp_manager.checkpoint.async_save = 1, False
    check(config)
    return config


@pytest.fixture(scope="module")
def whole(folders: dict[str, DatasetConfig], tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An undisturbed run: its results and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    [results] = run_ranks(1, train, staged(folders, tokenizer_folder, folder))
    return results, folder


def kill_at(config: RunConfig, step: int) -> None:
    """Train until the first rank is killed in a step, counted from 1."""
    killed = copy.deepcopy(config)
    killed.resilience.faults = [f"kill:rank=0,step={step}"]
    [process], _ = start_ranks(1, train, (killed,))
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert len(losses(Path(config.exp_manager.explicit_log_dir))) == step - 1


# Continues after step 1, within the first stage; after step 3, its last; and after step 5, within the second.
@pytest.mark.parametrize("step", [2, BORDER + 1, 6])
def test_a_killed_run_continues_bit_by_bit(
    whole: Any, folders: dict[str, DatasetConfig], tokenizer_folder: str, tmp_path: Path, step: int
) -> None:
    config = staged(folders, tokenizer_folder, tmp_path)
    kill_at(config, step)
    [resumed] = run_ranks(1, train, config)
    assert resumed["losses"] == whole[0]["losses"]
    for name, weight in whole[0]["weights"].items():
        np.testing.assert_array_equal(resumed["weights"][name], weight)


@pytest.mark.parametrize("layout", [{}, {"context_parallel_size": 2}])
def test_a_run_continues_under_another_layout(
    whole: Any, folders: dict[str, DatasetConfig], tokenizer_folder: str, tmp_path: Path, layout: dict[str, int]
) -> None:
    config = staged(folders, tokenizer_folder, tmp_path)
    kill_at(config, BORDER + 1)
    config.trainer.devices = 2
    for name, value in layout.items():
        setattr(config.model, name, value)
    resumed = run_ranks(2, train, config)[0]
    np.testing.assert_allclose(resumed["losses"], whole[0]["losses"], rtol=1e-5)


def test_the_log_names_the_stages(
    folders: dict[str, DatasetConfig], tokenizer_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, train, staged(folders, tokenizer_folder, tmp_path))
    log = capfd.readouterr().out
    assert "step 1: stage 1 of 2, first: steps 1 to 3, pictures 75.00%, words 25.00% of the samples\n" in log
    assert "step 4: stage 2 of 2, second: steps 4 to 6, pictures 20.00%, words 80.00% of the tokens (pictures" in log
    assert f"step 3/{STEPS}  stage first  loss" in log and f"step 4/{STEPS}  stage second  loss" in log
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if "loss" in row] == [1, 1, 1, 2, 2, 2]


def test_another_mixture_is_refused_at_a_resume_and_a_longer_run_is_not(
    folders: dict[str, DatasetConfig], tokenizer_folder: str, tmp_path: Path
) -> None:
    config = staged(folders, tokenizer_folder, tmp_path)
    config.model.optim.sched.name = "constant"
    config.trainer.max_steps = 4
    run_ranks(1, train, config)
    other = copy.deepcopy(config)
    other.trainer.max_steps, other.data.schedule[1].weights = 6, {"words": 1}
    run_ranks(1, refused, other)
    # The last stage lasts longer.
    config.trainer.max_steps = 5
    assert len(run_ranks(1, train, config)[0]["losses"]) == 5


def refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"data \(its shards, weights, data.schedule, model.seed or"):
        train(config)
