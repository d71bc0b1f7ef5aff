"""A checkpoint of one line of megatron-core continues on the other, with the losses of an undisturbed run.

Needs a second environment, such as `make venv PYTHON=python3.12` makes; ANYMAL_OTHER_PYTHON is the path of its Python.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine import losses
from tiny import make_config

from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.dependencies.megatron_line import LINES

ROOT = Path(__file__).parents[2]
OTHER = os.environ.get("ANYMAL_OTHER_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHER, reason="set ANYMAL_OTHER_PYTHON to the Python of the other line of megatron-core"),
]
TRAIN = """
import pickle, sys
from engine import train
from ranks import run_ranks

if __name__ == "__main__":
    config = pickle.load(open(sys.argv[1], "rb"))
    ranks = config.trainer.devices
    train(config) if ranks == 1 else run_ranks(ranks, train, config)
"""


def run_with(python: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([python, "-W", "ignore", *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def pythons() -> dict[str, str]:
    """Release of megatron-core -> a Python that has it."""
    code = "from importlib.metadata import version; print(version('megatron-core'))"
    interpreters = {run_with(python, "-c", code).strip(): python for python in (sys.executable, OTHER)}
    assert interpreters.keys() == {line.version for line in LINES}
    return interpreters


def train_with(python: str, config: RunConfig, folder: Path, steps: int) -> list[float]:
    """Continue a run in a folder up to `steps`; the losses of all its steps."""
    config = copy.deepcopy(config)
    config.exp_manager.explicit_log_dir = str(folder)
    # The learning rate depends on the run's length.
    config.trainer.max_steps, config.model.optim.sched.decay_steps = steps, 6
    stored = folder.with_suffix(".pickle")
    stored.write_bytes(pickle.dumps(config))
    run_with(python, "-c", TRAIN, str(stored))
    return losses(folder)


def frozen(config: RunConfig) -> None:
    """Projectors and the IMU encoder train, on one process."""


def adapters_over_ranks(config: RunConfig) -> None:
    config.model.lora = LoraConfig(r=2, alpha=8.0)
    config.trainer.devices = config.model.tensor_model_parallel_size = 2
    config.model.sequence_parallel = True


def everything_in_buckets(config: RunConfig) -> None:
    config.model.language_model.freeze = False
    config.model.ddp.overlap_grad_reduce, config.model.ddp.bucket_size = True, 1000


@pytest.mark.timeout(900)
@pytest.mark.parametrize("change", [frozen, adapters_over_ranks, everything_in_buckets])
def test_losses_stay_the_same(
    change, pythons: dict[str, str], mixed_shards: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "unused")
    change(config)
    older, newer = (pythons[line.version] for line in LINES)
    undisturbed = train_with(older, config, tmp_path / "whole", 6)
    assert len(undisturbed) == 6
    for name, first, second in (("forward", older, newer), ("back", newer, older)):
        train_with(first, config, tmp_path / name, 3)
        resumed = train_with(second, config, tmp_path / name, 6)
        np.testing.assert_allclose(resumed, undisturbed, rtol=1e-6, err_msg=json.dumps([name, resumed, undisturbed]))
