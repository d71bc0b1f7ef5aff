"""What can be seen on one node before a run: software, files, the run's folder, free disk, free GPU memory."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.resilience.exit_codes import is_users

# Each node writes one file into it, named after itself.
SIGNS = ".preflight"
# A card of which another process holds more than the rest is refused: a CUDA context of one's own takes about 2 %.
_FREE_SHARE = 0.9


@dataclass(frozen=True)
class Problem:
    """What would stop a run, or spoil it."""

    # software, files, run folder, disk, GPU, network or clock.
    check: str
    text: str
    fix: str

    def __str__(self) -> str:
        return f"{self.check}: {self.text}. Mend: {self.fix}"


def within(seconds: float, check: str, look: Callable[[], list[Problem]]) -> list[Problem]:
    """What `look` finds; a problem of its own where it fails or is not done in time, as on a file system that hangs."""
    found = in_time(seconds, check, look)
    if found is None:
        mend = "look for a file system or a device that hangs there"
        return [Problem(check, f"no answer within {seconds:.0f} s", mend)]
    return found


def in_time(seconds: float, check: str, look: Callable[[], list[Problem]]) -> Optional[list[Problem]]:
    """What `look` finds, or a problem where it fails; None where it is not done in time."""
    found: list[list[Problem]] = []

    def work() -> None:
        try:
            found.append(look())
        except Exception as error:  # Whatever it is, the table has to say it and the other checks go on.
            text = " ".join(str(error).split())[:500]
            if is_users(error):
                found.append([Problem(check, text.rstrip("."), "as it says")])
            else:
                found.append([Problem(check, f"{type(error).__name__}: {text}", "the check itself failed with that")])

    # Not a pool: one that hangs in the kernel must not keep the process from ending.
    worker = threading.Thread(target=work, name=f"preflight {check}", daemon=True)
    worker.start()
    worker.join(seconds)
    return found[0] if found else None


def software(config: RunConfig) -> list[Problem]:
    """What the doctor finds missing, and what this machine cannot run of the configuration."""
    from megatron_anymal import backend, environment

    wrong = [finding for finding in environment.examine() if finding.required and finding.state != environment.OK]
    if wrong:
        return [Problem("software", f"{one.part} {one.version}: {one.state}", one.fix) for one in wrong]
    try:
        backend.check_backend(config)
    except ConfigError as error:
        return [Problem("software", str(error).rstrip("."), "as it says, or run `anymal doctor` there")]
    devices = len(backend.capabilities().cuda_devices)
    if 0 < devices < config.trainer.devices:
        text = f"trainer.devices={config.trainer.devices}, and {devices} CUDA device(s) are seen"
        return [Problem("software", text, "ask Slurm for as many (--gpus-per-node), or look at nvidia-smi there")]
    return []


def files(config: RunConfig) -> list[Problem]:
    """Folders of the configuration that cannot be read here. Addresses such as s3://... are left to the run."""
    found = []
    for key, path in _inputs(config):
        if path and "://" not in path and not os.access(path, os.R_OK):
            what = "cannot be read" if os.path.exists(path) else "is not there"
            mend = f"put it on storage that all nodes share, or set {key}"
            found.append(Problem("files", f"{key}={path!r} {what}", mend))
    return found


def _inputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    model, data = config.model, config.data
    yield "model.language_model.path", model.language_model.path
    yield "model.language_model.checkpoint", model.language_model.checkpoint
    yield "model.restore_from_path", model.restore_from_path
    yield "data.tokenizer", data.tokenizer
    for name, modality in model.modalities.items():
        yield f"model.modalities.{name}.encoder.path", modality.encoder.path
    for split, sets in (("train", data.train), ("validation", data.validation)):
        for name, dataset in sets.items():
            yield f"data.{split}.{name}.path", dataset.path


def leave_sign(run_dir: Path, node: str, token: str) -> list[Problem]:
    """Write this node's file into the run's folder, for the others to find."""
    path = run_dir / SIGNS / node
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = f"{str(run_dir)!r} cannot be written ({error.strerror})"
        mend = "mount it writable there, or name another folder (exp_manager.explicit_log_dir)"
        return [Problem("run folder", text, mend)]
    return []


def look_for_signs(run_dir: Path, nodes: Iterable[str], token: str) -> list[Problem]:
    """That what the other nodes wrote into the run's folder is there."""
    unseen = [node for node in nodes if _read(run_dir / SIGNS / node) != token]
    if not unseen:
        return []
    text = f"{str(run_dir)!r} does not show what {', '.join(unseen)} wrote into it"
    return [Problem("run folder", text, "it must be the same folder on all nodes: name one on shared storage")]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def remove_signs(run_dir: Path) -> None:
    """After all have looked."""
    shutil.rmtree(run_dir / SIGNS, ignore_errors=True)


def disk(run_dir: Path, needed: int) -> tuple[int, list[Problem]]:
    """Free bytes where the run's folder is, or will be, and what is wrong with them."""
    there = run_dir.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free >= needed:
        return free, []
    text = f"{_gigabytes(free)} free at {str(run_dir)!r}, and its checkpoints need {_gigabytes(needed)} more"
    mend = "free some, name another folder (exp_manager.explicit_log_dir), or lower exp_manager.checkpoint.keep_last"
    return free, [Problem("disk", text, mend)]


def gpu(local_rank: int) -> tuple[int, list[Problem]]:
    """Free bytes of this process's card, and what is wrong with them; -1 without CUDA."""
    import torch

    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        return -1, []
    free, total = torch.cuda.mem_get_info(local_rank)
    if free >= _FREE_SHARE * total:
        return free, []
    text = f"card {local_rank} has {_gigabytes(free)} of {_gigabytes(total)} free"
    return free, [Problem("GPU", text, "nvidia-smi there names the processes that hold the rest: end them")]


def skewed(offsets: Sequence[float], nodes: Sequence[str], limit: float) -> dict[str, Problem]:
    """The nodes whose clocks are more than `limit` seconds from the middle one. One offset a node, in seconds."""
    middle = sorted(offsets)[len(offsets) // 2]
    mend = "start chronyd or ntpd there: times of logs and files would mislead"
    return {
        node: Problem("clock", f"it is {offset - middle:+.1f} s from the other nodes'", mend)
        for node, offset in zip(nodes, offsets)
        if abs(offset - middle) > limit
    }


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"
