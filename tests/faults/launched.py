"""Launched runs of a tiny AnyMAL, and what must be the same as in a run that nothing happened to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from tiny import make_config

from megatron_anymal.checkpoint.store import newest_valid
from megatron_anymal.config import DatasetConfig

ROOT = Path(__file__).parents[2]


def write_config(folder: Path, train: str, validation: str, tokenizer: str, steps: int, every: int) -> None:
    """FOLDER/tiny.yaml: a run with a checkpoint and a validation every few steps, read ahead by a worker."""
    config = make_config(train, tokenizer, folder / "run")
    config.trainer.max_steps = steps
    config.trainer.val_check_interval = config.exp_manager.checkpoint.every_n_train_steps = every
    config.trainer.limit_val_batches = 1
    config.exp_manager.create_tensorboard_logger = False
    config.data.validation = {"text": DatasetConfig(path=validation)}
    config.data.num_workers = 1
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))


def options(run: Path, processes: int) -> list[str]:
    """The overrides of a run: its folder, and replicas on all processes."""
    return [f"exp_manager.explicit_log_dir={run}", f"trainer.devices={processes}"]


def launch(folder: Path, run: Path, processes: int, *overrides: str, log: Path) -> subprocess.Popen[bytes]:
    """`anymal launch pretrain` of FOLDER/tiny.yaml."""
    words = [sys.executable, "-m", "megatron_anymal", "launch", "pretrain"]
    words += [f"--config-path={folder}", "--config-name=tiny", *options(run, processes), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT)


def faults(*described: str) -> str:
    """The override that plans faults."""
    return f"resilience.faults=[{','.join(repr(fault) for fault in described)}]"


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, by name: weights and optimizer."""
    folder, problems = newest_valid(run / "checkpoints")
    assert folder is not None and not problems, problems
    reader = dcp.FileSystemReader(str(folder))
    metadata = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def differences(run: Path, other: Path) -> list[str]:
    """The names of what differs between two runs' last checkpoints; empty where they are the same bit for bit."""
    first, second = final_state(run), final_state(other)
    assert first
    return [
        name
        for name in sorted(first.keys() | second.keys())
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    ]
