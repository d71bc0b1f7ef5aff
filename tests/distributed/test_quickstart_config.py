"""The quickstart's configurations give the same losses on several processes as on one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from engine import train_as_configured
from ranks import run_ranks

STEPS = 20
Rows = list[dict[str, float]]


def run(folder: Path, name: str, processes: int, *overrides: str, steps: int = STEPS) -> Rows:
    """Train with a configuration of a folder, and return the metrics of each step."""
    run = folder / f"{name}-{processes}"
    settings = [
        *(f"trainer.devices={processes}", f"trainer.max_steps={steps}", "trainer.log_every_n_steps=1"),
        *("trainer.val_check_interval=0", "trainer.limit_val_batches=0", f"exp_manager.explicit_log_dir={run}"),
    ]
    run_ranks(processes, train_as_configured, folder, name, *settings, *overrides, timeout=280)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def values(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows]


def test_tp2_pp2_equals_one_process(quickstart_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(quickstart_folder, tmp_path / "runs" / "quickstart")
    one = run(tmp_path, "quickstart", 1, "model.tensor_model_parallel_size=1")
    layout = ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"]
    four = run(tmp_path, "quickstart", 4, *layout)
    assert len(one) == len(four) == STEPS
    np.testing.assert_allclose(values(four, "loss"), values(one, "loss"), rtol=1e-5)


@pytest.mark.timeout(900)
def test_sft_and_dpo_equal_one_process(quickstart_folder: Path, tmp_path: Path) -> None:
    """Uses the configurations' own sequence- and context-parallel layouts. DPO starts from the SFT adapters."""
    shutil.copytree(quickstart_folder, tmp_path / "runs" / "quickstart")
    alone = ["model.tensor_model_parallel_size=1", "model.sequence_parallel=false"]
    one = run(tmp_path, "quickstart_sft", 1, *alone, steps=4)
    two = run(tmp_path, "quickstart_sft", 2, steps=4)
    assert len(one) == 4
    np.testing.assert_allclose(values(two, "loss"), values(one, "loss"), rtol=1e-5)
    start = f"model.restore_from_path={tmp_path / 'quickstart_sft-2'}"
    one = run(tmp_path, "quickstart_dpo", 1, start, "model.context_parallel_size=1", steps=4)
    two = run(tmp_path, "quickstart_dpo", 2, start, steps=4)
    assert len(one) == 4
    for name in ("loss", "rewards/margin"):
        np.testing.assert_allclose(values(two, name), values(one, name), rtol=1e-4, atol=1e-6)
    # The policy starts as a copy of the reference and differs from it only in NEFTune's noise.
    assert abs(values(one, "loss")[0] - np.log(2)) < 0.2
    assert values(one, "loss")[0] != values(one, "loss")[-1]


def test_any_to_any_equals_one_process(quickstart_folder: Path, tmp_path: Path) -> None:
    """Two replicas of the whole Llama, whose vocabulary has grown by codes."""
    shutil.copytree(quickstart_folder, tmp_path / "runs" / "quickstart")
    one = run(tmp_path, "quickstart_any_to_any", 1, steps=4)
    two = run(tmp_path, "quickstart_any_to_any", 2, steps=4)
    assert len(one) == 4
    for name in ("loss", "target_loss/text", "target_loss/picture", "target_loss/sound"):
        np.testing.assert_allclose(values(two, name), values(one, name), rtol=1e-5)
