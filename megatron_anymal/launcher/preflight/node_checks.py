"""Checks of a single node before a run: software, files, the run's folder, free disk space, free GPU memory."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megatron_anymal.config import ConfigError, DataConfig, ModelConfig, TrainerConfig, is_remote
from megatron_anymal.resilience.exit_codes import is_users

# Subfolder of the run's folder; each node writes a file with its name into it.
SIGNS = ".preflight"
# A GPU with a smaller share of free memory is in use by another process; this process's CUDA context takes about 2 %.
_FREE_SHARE = 0.9


@dataclass(frozen=True)
class NodeProblem:
    """Something that would stop a run or corrupt its results."""

    # software, files, run folder, disk, GPU, network or clock.
    check: str
    # What is wrong.
    text: str
    # Advice for the user.
    fix: str

    def __str__(self) -> str:
        return f"{self.check}: {self.text}. Fix: {self.fix}"


def within(seconds: float, check: str, look: Callable[[], list[NodeProblem]]) -> list[NodeProblem]:
    """Problems found by `look`, or a timeout problem if it does not finish in time, as on a hanging file system."""
    problems = in_time(seconds, check, look)
    if problems is None:
        fix = "look for a hanging file system or device on that node"
        return [NodeProblem(check, f"no answer within {seconds:.0f} s", fix)]
    return problems


def in_time(seconds: float, check: str, look: Callable[[], list[NodeProblem]]) -> Optional[list[NodeProblem]]:
    """Problems found by `look`, or a problem with its error if it raises; None if it does not finish in time."""
    results: list[list[NodeProblem]] = []

    def work() -> None:
        try:
            results.append(look())
        except Exception as error:  # Show any error in the table and continue with the other checks.
            text = " ".join(str(error).split())[:500]
            if is_users(error):
                results.append([NodeProblem(check, text.rstrip("."), "see the message")])
            else:
                results.append(
                    [NodeProblem(check, f"{type(error).__name__}: {text}", "the check itself raised this error")]
                )

    # A daemon thread rather than a pool: one that hangs in the kernel must not keep the process from exiting.
    worker = threading.Thread(target=work, name=f"preflight {check}", daemon=True)
    worker.start()
    worker.join(seconds)
    return results[0] if results else None


def software(model: ModelConfig, trainer: TrainerConfig) -> list[NodeProblem]:
    """Missing software as found by `anymal doctor`, and settings that this machine cannot run."""
    from megatron_anymal import backend, environment

    wrong = [finding for finding in environment.examine() if finding.required and finding.state != environment.OK]
    if wrong:
        return [NodeProblem("software", f"{one.part} {one.version}: {one.state}", one.fix) for one in wrong]
    try:
        backend.check_backend(model, trainer.precision)
    except ConfigError as error:
        return [NodeProblem("software", str(error).rstrip("."), "see the message, or run `anymal doctor` on that node")]
    devices = len(backend.capabilities().cuda_devices)
    if 0 < devices < trainer.devices:
        text = f"trainer.devices={trainer.devices}, but only {devices} CUDA device(s) are visible"
        return [
            NodeProblem("software", text, "request more from Slurm (--gpus-per-node), or check nvidia-smi on that node")
        ]
    return []


def files(model: ModelConfig, data: DataConfig) -> list[NodeProblem]:
    """Input folders of the configuration that this node cannot read. URLs such as s3://... are not checked."""
    problems = []
    for key, path in _inputs(model, data):
        if path and not is_remote(path) and not os.access(path, os.R_OK):
            state = "cannot be read" if os.path.exists(path) else "does not exist"
            fix = f"put it on storage that all nodes share, or set {key}"
            problems.append(NodeProblem("files", f"{key}={path!r} {state}", fix))
    return problems


def _inputs(model: ModelConfig, data: DataConfig) -> Iterator[tuple[str, str]]:
    yield "model.language_model.path", model.language_model.path
    yield "model.language_model.checkpoint", model.language_model.checkpoint
    yield "model.restore_from_path", model.restore_from_path
    yield "data.tokenizer", data.tokenizer
    for name, modality in model.modalities.items():
        yield f"model.modalities.{name}.encoder.path", modality.encoder.path
    for split, sets in (("train", data.train), ("validation", data.validation)):
        for name, dataset in sets.items():
            yield f"data.{split}.{name}.path", dataset.path


def leave_sign(run_dir: Path, node: str, token: str) -> list[NodeProblem]:
    """Write this node's file into the run's folder, where the other nodes look for it."""
    path = run_dir / SIGNS / node
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = f"{str(run_dir)!r} cannot be written ({error.strerror})"
        fix = "mount it writable on that node, or choose another folder (exp_manager.explicit_log_dir)"
        return [NodeProblem("run folder", text, fix)]
    return []


def look_for_signs(run_dir: Path, nodes: Iterable[str], token: str) -> list[NodeProblem]:
    """Check that the files which the other nodes wrote into the run's folder are visible."""
    unseen = [node for node in nodes if _read(run_dir / SIGNS / node) != token]
    if not unseen:
        return []
    text = f"{str(run_dir)!r} does not show what {', '.join(unseen)} wrote into it"
    return [NodeProblem("run folder", text, "it must be the same folder on all nodes: choose one on shared storage")]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def remove_signs(run_dir: Path) -> None:
    """Remove the files again, after all nodes have looked for them."""
    shutil.rmtree(run_dir / SIGNS, ignore_errors=True)


def disk(run_dir: Path, needed: int) -> tuple[int, list[NodeProblem]]:
    """Free bytes on the disk of the run's folder, which may not exist yet, and a problem if they are too few."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return free, []
    text = f"{_gigabytes(free)} free at {str(run_dir)!r}, but its checkpoints need another {_gigabytes(needed)}"
    fix = "free space, choose another folder (exp_manager.explicit_log_dir), or lower exp_manager.checkpoint.keep_last"
    return free, [NodeProblem("disk", text, fix)]


def gpu(local_rank: int) -> tuple[int, list[NodeProblem]]:
    """Free bytes of this process's GPU, -1 without CUDA, and a problem if they are too few."""
    import torch

    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        return -1, []
    free, total = torch.cuda.mem_get_info(local_rank)
    if free >= _FREE_SHARE * total:
        return free, []
    text = f"GPU {local_rank} has {_gigabytes(free)} of {_gigabytes(total)} free"
    return free, [NodeProblem("GPU", text, "end the processes that use the rest; nvidia-smi on that node lists them")]


def skewed(offsets: Sequence[float], nodes: Sequence[str], limit: float) -> dict[str, NodeProblem]:
    """Nodes whose clocks differ from the median by more than `limit` seconds; `offsets` has one value per node."""
    median = sorted(offsets)[len(offsets) // 2]
    fix = "start chronyd or ntpd on that node; otherwise the times of logs and files are misleading"
    return {
        node: NodeProblem("clock", f"it is {offset - median:+.1f} s off from the other nodes", fix)
        for node, offset in zip(nodes, offsets)
        if abs(offset - median) > limit
    }


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"
