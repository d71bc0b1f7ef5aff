"""Launch runs of a tiny AnyMAL, and compare them with an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint as dcp
import yaml
from test_sigkill import figures, kill, steps_of
from tiny import make_config

from megatron_anymal.checkpoint.store import newest_valid
from megatron_anymal.config import DatasetConfig
from megatron_anymal.launcher.agent import ranks_below
from megatron_anymal.launcher.hang_detector import catches
from megatron_anymal.resilience.events import read

ROOT = Path(__file__).parents[2]


def write_config(folder: Path, train: str, validation: str, tokenizer: str, steps: int, every: int) -> None:
    """Write FOLDER/tiny.yaml: a run with one loader worker, and a checkpoint and a validation every `every` steps."""
    config = make_config(train, tokenizer, folder / "run")
    config.trainer.max_steps = steps
    config.trainer.val_check_interval = config.exp_manager.checkpoint.every_n_train_steps = every
    config.trainer.limit_val_batches = 1
    config.exp_manager.create_tensorboard_logger = False
    config.data.validation = {"text": DatasetConfig(path=validation)}
    config.data.num_workers = 1
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))


def options(run: Path, processes: int) -> list[str]:
    """Overrides for a run's folder and layout. Four processes are two replicas of two tensor-parallel ranks."""
    return [
        f"exp_manager.explicit_log_dir={run}",
        f"trainer.devices={processes}",
        f"model.tensor_model_parallel_size={1 + processes // 4}",
    ]


def launch(
    folder: Path,
    run: Path,
    processes: int,
    *overrides: str,
    log: Path,
    node: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start `anymal launch pretrain` with FOLDER/tiny.yaml.

    Args:
        node: launcher options for one of several nodes.
    """
    words = [sys.executable, "-m", "megatron_anymal", "launch", *node, "pretrain"]
    words += [f"--config-path={folder}", "--config-name=tiny", *options(run, processes), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], log: Path, code: int = 0, patience: float = 1200) -> str:
    """Wait for a launcher to exit with the given code, and return its log."""
    try:
        assert process.wait(patience) == code, log.read_text()[-4000:]
    finally:
        kill(process)
    return log.read_text()


def told(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return a run's events of one kind."""
    return [event for event in read(run) if event["kind"] == kind]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a running run has logged a step."""
    deadline = time.monotonic() + 300
    while max(steps_of(run), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def rank_processes(launcher: int) -> dict[int, int]:
    """Rank -> process ID of the running ranks of a launcher that handle stop signals."""
    below = [child for direct in psutil.Process(launcher).children() for child in direct.children()]
    # Those that the standby process forked have a name; torchrun's own have a variable.
    named = {int(p.name().split()[-1]): p.pid for p in below if p.name().startswith("anymal rank ")}
    started = [ranks_below(child.pid) for child in psutil.Process(launcher).children()]
    pids = {rank: pid for ranks in (*started, named) for rank, pid in ranks.items()}
    return {rank: pid for rank, pid in pids.items() if catches(pid, signal.SIGUSR1)}


def faults(*described: str) -> str:
    """Return the override that schedules faults."""
    return f"resilience.faults=[{','.join(repr(fault) for fault in described)}]"


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a run's newest checkpoint by name: weights and optimizer state."""
    folder, problems = newest_valid(run / "checkpoints")
    assert folder is not None and not problems, problems
    reader = dcp.FileSystemReader(str(folder))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def differences(run: Path, other: Path) -> list[str]:
    """Return the names of tensors in two runs' last checkpoints that are not bit-identical."""
    first, second = final_state(run), final_state(other)
    assert first
    return [
        name
        for name in sorted(first.keys() | second.keys())
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    ]


def assert_same(run: Path, other: Path) -> None:
    """Assert that the metrics of every step and the final weights and optimizer state are bit-identical."""
    assert figures(run) == figures(other)
    assert not differences(run, other)
