"""A run that is killed without warning and restarted with the same command ends like an undisturbed run.

test_launch_real.py does the same with torchrun and the launcher.
"""

from __future__ import annotations

import copy
import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from engine import train
from fork_server import Interpreter, job
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tiny import make_config

from megatron_anymal.config import DatasetConfig, RunConfig
from megatron_anymal.config.compose import compose
from megatron_anymal.train.memory_metrics import MEMORY_METRICS
from megatron_anymal.train.pass_times import PASS_METRICS
from megatron_anymal.train.utilization import UTILIZATION_METRICS

STEPS, EVERY = 14, 4


@pytest.fixture(scope="module")
def folder(
    mixed_shards: str, text_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with tiny.yaml: a run of 14 steps with a checkpoint and a validation every 4 steps."""
    folder = tmp_path_factory.mktemp("sigkill")
    config = make_config(mixed_shards, tokenizer_folder, folder / "run")
    config.trainer.max_steps = STEPS
    config.trainer.val_check_interval = config.exp_manager.checkpoint.every_n_train_steps = EVERY
    config.trainer.limit_val_batches = 1
    config.data.validation = {"text": DatasetConfig(path=text_shards)}
    # As in a real run, samples are prefetched by a worker process.
    config.data.num_workers = 1
    values = {"defaults": ["anymal", "_self_"], **config.to_dict()}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder


def options(run: Path, processes: int) -> list[str]:
    """Overrides for a run's folder and layout."""
    return [
        f"exp_manager.explicit_log_dir={run}",
        f"trainer.devices={processes}",
        f"model.tensor_model_parallel_size={processes}",
    ]


def start(folder: Path, run: Path, verb: str, processes: int, log: Path, *overrides: str) -> list[Interpreter]:
    """Start the ranks of `anymal VERB` with FOLDER/tiny.yaml. The file of rank 0's output is `log`."""
    command = ["-m", "megatron_anymal", verb, f"--config-path={folder}", "--config-name=tiny"]
    command += [*options(run, processes), *overrides]
    return job(*command, world=processes, log=log, cwd=log.parent)


def finish(ranks: list[Interpreter], log: Path) -> str:
    """Wait for ranks to end without an error, and return rank 0's output."""
    try:
        assert [rank.wait(240) for rank in ranks] == [0] * len(ranks), log.read_text()[-3000:]
    finally:
        kill(*ranks)
    return log.read_text()


def kill(*processes: Interpreter | subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to processes and all their descendants, as if the machine had failed."""
    running = [process for process in processes if process.poll() is None]
    tops = [psutil.Process(process.pid) for process in running]
    for one in [*tops, *(child for top in tops for child in top.children(recursive=True))]:
        one.kill()
    for process in running:
        process.wait(240)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in metrics(run) if "loss" in row]


def figures(run: Path) -> list[dict[str, float]]:
    """Return the metrics that must be bit-identical, which excludes timings and memory."""
    timed = (
        "tokens_per_second",
        "step_seconds",
        "data_wait_share",
        *MEMORY_METRICS,
        *PASS_METRICS,
        *UTILIZATION_METRICS,
    )
    return [{name: value for name, value in row.items() if name not in timed} for row in metrics(run)]


def logged_to_tensorboard(run: Path) -> Counter[int]:
    """Count how often each step occurs in the event files on disk."""
    counts: Counter[int] = Counter()
    for file in run.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(file)).Load():
            counts.update(event.step for value in event.summary.value if value.tag == "loss")
    return counts


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_in_the_middle(folder: Path, processes: int) -> None:
    whole, run = folder / f"whole{processes}", folder / f"killed{processes}"
    config = compose("tiny", folder, options(whole, processes)).config
    run_ranks(processes, train, config)
    assert steps_of(whole) == list(range(1, STEPS + 1))

    ranks = start(folder, run, "pretrain", processes, folder / "killed.log")
    deadline = time.monotonic() + 240
    # Wait until there is a checkpoint and later steps are logged.
    while len(steps_of(run)) < EVERY + 2 and ranks[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    kill(*ranks)
    reached = max(steps_of(run), default=0)
    assert EVERY + 2 <= reached < STEPS, (folder / "killed.log").read_text()[-3000:]
    saved = max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
    on_disk = logged_to_tensorboard(run)

    again = folder / "again.log"
    output = finish(start(folder, run, "pretrain", processes, again), again)
    assert f"at step {saved}" in output
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert figures(run) == figures(whole)
    # Only steps that were trained twice may occur twice, and no step is missing.
    events = logged_to_tensorboard(run)
    assert set(events) == set(range(1, STEPS + 1))
    assert {step for step, times in events.items() if times > 1} == {step for step in on_disk if step > saved}
    shown = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars("loss")
    last = {event.step: event.value for event in shown}
    assert [last[step] for step in sorted(last)] == pytest.approx(
        [row["loss"] for row in metrics(whole) if "loss" in row]
    )


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    return make_config(mixed_shards, tokenizer_folder, tmp_path / "run")


def test_run_in_slices_of_time_is_bit_identical(config: RunConfig, tmp_path: Path) -> None:
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir = str(tmp_path / "whole")
    undisturbed = run_ranks(2, train, two_replicas(whole))[0]["losses"]
    # With a time limit of zero, each start trains one step and saves a checkpoint.
    config.exp_manager.max_time_per_run = "00:00:00:00"
    for started in range(1, 7):
        losses = run_ranks(2, train, two_replicas(config))[0]["losses"]
        assert losses == undisturbed[:started]
        assert (tmp_path / "run" / "checkpoints" / f"step_{started:08d}").is_dir()


def two_replicas(config: RunConfig) -> RunConfig:
    config.trainer.devices = 2
    return config


def test_time_limit_stops_with_a_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.max_steps = 100_000
    config.exp_manager.checkpoint.every_n_train_steps = 0
    config.exp_manager.max_time_per_run = "00:00:00:02"
    began = time.monotonic()
    reached = len(run_ranks(1, train, config)[0]["losses"])
    assert 2 <= time.monotonic() - began < 60 and 0 < reached < 100_000
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{reached:08d}"]
