"""The quickstart's own configuration under torchrun, as a user starts it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 20


def pretrain(folder: Path, processes: int, *overrides: str) -> list[float]:
    """Run the configuration `quickstart` in a folder; the losses by step."""
    run = folder / f"run-{processes}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    words = [
        *(sys.executable, *launcher, "-m", "megatron_anymal", "pretrain", "--config-name=quickstart"),
        *(f"trainer.devices={processes}", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1"),
        *("trainer.val_check_interval=0", "trainer.limit_val_batches=0", f"exp_manager.explicit_log_dir={run}"),
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.timeout(600)
def test_tp2_pp2_equals_one_process(quickstart_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(quickstart_folder, tmp_path / "runs" / "quickstart")
    one = pretrain(tmp_path, 1, "model.tensor_model_parallel_size=1")
    four = pretrain(tmp_path, 4, "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")
    assert len(one) == len(four) == STEPS
    np.testing.assert_allclose(four, one, rtol=1e-5)
