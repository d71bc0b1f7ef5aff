"""If a checkpoint cannot be written or read, the run continues with what is left, and warns."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from cuts import Disk, Operation
from engine import train
from ranks import run_ranks
from test_sigkill import figures
from tiny import make_config

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.async_writer import CheckpointWriter
from megatron_anymal.checkpoint.newest_valid import find_newest_valid
from megatron_anymal.checkpoint.snapshot import Plan
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.config import RunConfig
from megatron_anymal.resilience import events
from megatron_anymal.safetensors_io import HashedFile
from megatron_anymal.train import loop

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """Nine steps, a checkpoint every three steps, and the two newest ones kept."""
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.max_steps, config.exp_manager.checkpoint.keep_last = 9, 2
    return config


def saved(run: Path) -> list[int]:
    return [store.step_of(folder) for folder in reversed(store.committed(run / "checkpoints"))]


def train_and_tell(config: RunConfig, disturb: Callable[[Path], None] = lambda folder: None) -> tuple[str, str]:
    """In a rank: train, and return the output and the error that ended the run."""
    disturb(Path(config.exp_manager.explicit_log_dir) / "checkpoints")
    output, error = io.StringIO(), ""
    with contextlib.redirect_stdout(output):
        try:
            train(config)
        except CheckpointError as failure:
            error = str(failure)
    return output.getvalue(), error


def refuse(rank: int, code: int, kind: str, steps: tuple[int, ...], name: str = "") -> Callable[[Path], None]:
    """Make one kind of operation fail on one rank in the checkpoints of the given steps."""

    def meet(operation: Operation) -> None:
        if operation.kind == kind and any(f"{step:08d}" in operation.path for step in steps) and name in operation.path:
            raise OSError(code, os.strerror(code))

    def disturb(folder: Path) -> None:
        if int(os.environ["RANK"]) == rank:
            Disk(folder, meet).install()

    return disturb


FAULTS = {
    "no-space-in-a-write": (0, errno.ENOSPC, "write", "__0_0.distcp"),
    "no-space-in-the-manifest": (0, errno.ENOSPC, "write", "manifest.json"),
    "bad-disk-in-a-sync": (0, errno.EIO, "fsync", "__0_0.distcp"),
    "bad-disk-in-the-commit": (0, errno.EIO, "rename", ""),
    "no-folder": (0, errno.EACCES, "mkdir", ""),
    "no-space-on-the-other-rank": (1, errno.ENOSPC, "write", "__1_0.distcp"),
    "bad-disk-on-the-other-rank": (1, errno.EIO, "fsync", "__1_0.distcp"),
    "no-space-on-one-of-four": (1, errno.ENOSPC, "write", "__1_0.distcp"),
    "bad-disk-on-one-of-four": (1, errno.EIO, "fsync", "__1_0.distcp"),
}
# Marked slow, because another fault covers the same path.
SLOW_FAULTS = ("no-space-in-the-manifest", "no-folder", "bad-disk-on-the-other-rank", "bad-disk-on-one-of-four")


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.slow] if fault in SLOW_FAULTS else []) for fault in FAULTS]
)
def test_training_goes_on_and_tries_again(config: RunConfig, fault: str, tmp_path: Path) -> None:
    rank, code, kind, name = FAULTS[fault]
    # With four processes, the ranks of the second replica have nothing to write.
    processes = 4 if "four" in fault else 1 + rank
    config.trainer.devices, config.model.tensor_model_parallel_size = processes, min(2, processes)
    config.exp_manager.checkpoint.keep_last = 1
    ended = run_ranks(processes, train_and_tell, config, refuse(rank, code, kind, (6,), name))
    assert [error for _, error in ended] == [""] * processes
    output = ended[0][0]
    # The warning names the checkpoint, the reason and what happens next. The older checkpoint stays until the newer is
    # committed.
    [warning] = [line for line in output.splitlines() if line.startswith("warning") and "checkpoints" in line]
    for words in (
        "step_00000006 could not be written",
        os.strerror(code),
        "No older checkpoint was deleted",
        "next save",
    ):
        assert words in warning, warning
    assert (f"rank {rank}: " in warning) == (processes > 1)
    assert output.index("step 6/9") < output.index(warning) and "step 7/9" in output and "saved" in output
    assert saved(tmp_path / "run") == [9]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000009"]
    assert store.newest_valid(tmp_path / "run" / "checkpoints")[1] == []


@pytest.mark.slow
def test_older_ones_stay_while_newer_ones_fail(config: RunConfig, tmp_path: Path) -> None:
    config.exp_manager.checkpoint.keep_last = 1
    output, error = run_ranks(1, train_and_tell, config, refuse(0, errno.ENOSPC, "write", (6, 9)))[0]
    assert output.count("could not be written") == 2 and "step 9/9" in output
    # The last save failed, so the run fails and names the newest checkpoint left.
    assert "last checkpoint could not be written" in error and "No space left on device" in error
    assert str(tmp_path / "run" / "checkpoints" / "step_00000003") in error and "start" in error
    assert saved(tmp_path / "run") == [3]
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir = str(tmp_path / "whole")
    run_ranks(1, train, whole)
    output, error = run_ranks(1, train_and_tell, config)[0]
    assert "at step 3" in output and not error
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


@pytest.mark.slow
def test_old_checkpoints_that_cannot_be_deleted_stay(config: RunConfig, tmp_path: Path) -> None:
    config.exp_manager.checkpoint.keep_last = 1
    output, error = run_ranks(1, train_and_tell, config, refuse(0, errno.EIO, "rename", (3,), "step_00000003"))[0]
    assert not error and "old checkpoints could not be deleted" in output and "saved" in output
    assert saved(tmp_path / "run") == [3, 9]


def killed_writer(config: RunConfig, rank: int) -> tuple[str, str]:
    """In a rank: train with a writer that exits silently during the second checkpoint."""
    close = HashedFile.close

    def end(file: HashedFile) -> str:
        if f"00000006/__{rank}_" in str(file._file.name):
            raise SystemExit
        return close(file)

    HashedFile.close = end  # type: ignore[method-assign]
    return train_and_tell(config)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_background_writer_ends(config: RunConfig, rank: int, tmp_path: Path) -> None:
    config.trainer.devices, config.model.tensor_model_parallel_size = 4, 2
    ended = run_ranks(4, killed_writer, config, rank)
    assert [error for _, error in ended] == [""] * 4
    assert f"rank {rank}: SystemExit" in ended[0][0] and saved(tmp_path / "run") == [3, 9]


def too_little_memory(config: RunConfig, rank: int) -> tuple[str, str]:
    copied = Plan.copy

    def copy_of(plan: Plan) -> Any:
        if int(os.environ["RANK"]) == rank and plan._common["step"] == 6:
            raise MemoryError
        return copied(plan)

    Plan.copy = copy_of  # type: ignore[method-assign]
    return train_and_tell(config)


@pytest.mark.slow
def test_too_little_memory_for_the_copy_on_one_rank(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.devices = config.model.tensor_model_parallel_size = 2
    ended = run_ranks(2, too_little_memory, config, 1)
    assert [error for _, error in ended] == ["", ""]
    assert "rank 1: its shards could not be copied to host memory (MemoryError)" in ended[0][0]
    assert saved(tmp_path / "run") == [3, 9]


def failing_step(config: RunConfig, rank: int) -> bool:
    """In a rank: train with slow writes; one rank fails one step after the save began."""
    close, step = HashedFile.close, loop.train_step

    def slow(file: HashedFile) -> str:
        time.sleep(0.5)
        return close(file)

    def failing(state: Any, *arguments: Any) -> Any:
        if state.step == 3 and int(os.environ["RANK"]) == rank:
            raise RuntimeError("a bad step")
        return step(state, *arguments)

    HashedFile.close, loop.train_step = slow, failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        train(config)
    return (Path(config.exp_manager.explicit_log_dir) / "checkpoints" / "step_00000003").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_waits_for_the_save_under_way(config: RunConfig, rank: int, tmp_path: Path) -> None:
    # The other rank hangs in a collective of the next step, or fails because its peer is gone.
    config.trainer.devices = config.model.tensor_model_parallel_size = 2
    assert run_ranks(2, failing_step, config, rank)[rank]
    assert store.newest_valid(tmp_path / "run" / "checkpoints")[0] is not None


def slow_disk(config: RunConfig) -> tuple[str, str]:
    """In a rank: train with a disk that completes a checkpoint only once the next save or the end waits for it."""
    close, start, finish = HashedFile.close, CheckpointWriter.start, CheckpointWriter.finish
    wanted = 0

    def slow(file: HashedFile) -> str:
        path = Path(file._file.name)
        deadline = time.monotonic() + 240
        while path.suffix == ".distcp" and wanted <= int(path.parent.name[-8:]) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        return close(file)

    def starting(writer: CheckpointWriter, state: Any, manifest: Any) -> None:
        nonlocal wanted
        wanted = manifest.step if writer.rules.async_save else 100
        start(writer, state, manifest)

    def finishing(writer: CheckpointWriter) -> None:
        nonlocal wanted
        wanted = 100
        finish(writer)

    HashedFile.close = slow  # type: ignore[method-assign]
    CheckpointWriter.start, CheckpointWriter.finish = starting, finishing  # type: ignore[method-assign]
    return train_and_tell(config)


def test_training_goes_on_meanwhile_and_a_newer_save_waits(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.devices = 2
    output, error = run_ranks(2, slow_disk, config)[0]
    assert not error and saved(tmp_path / "run") == [6, 9]
    first, again = (output.index(words) for words in ("checkpoints/step_00000003 in", "waiting for"))
    assert output.index("step 6/9") < again < first, output
    assert output.count("waiting for") == 3 and output.count("saved ") == 3


def test_in_the_background_or_not_the_files_are_the_same(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.devices, config.trainer.max_steps = 2, 6
    config.model.pipeline_model_parallel_size = 2
    config.trainer.precision, config.exp_manager.checkpoint.keep_last = "bf16", 0
    config.model.language_model.freeze = False
    files = {}
    for kind in (True, False):
        one = copy.deepcopy(config)
        one.exp_manager.checkpoint.async_save = kind
        one.exp_manager.explicit_log_dir = str(tmp_path / str(kind))
        output = run_ranks(2, slow_disk, one)[0][0]
        assert ("waiting for" in output) == kind
        # The writing takes 0.3 s or more, and the part of it for which the next save waits is not counted.
        stalls = [(e["stalled"], e["seconds"]) for e in events.read(tmp_path / str(kind)) if e["kind"] == "saved"]
        assert len(stalls) == 2 and all((stalled < seconds - 0.25) == kind for stalled, seconds in stalls)
        folders = reversed(store.committed(tmp_path / str(kind) / "checkpoints"))
        files[kind] = [store.read_manifest(folder, verify=True).files for folder in folders]
    assert len(files[True]) == 2 and files[True] == files[False]
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "metadata.json"} == set(files[True][0])


def planned_twice(state: Any) -> bool:
    """In a rank: whether a later checkpoint's plan, which ranks do not cross-check, equals the first one's."""
    first, later = Plan(state, 6).copy(), Plan(state, 6, check=False).copy()
    same = [
        (*one[:3], one[3].shape) == (*other[:3], other[3].shape) and bool((one[3] == other[3]).all())
        for one, other in zip(first.chunks, later.chunks, strict=True)
    ]
    # The ranks of the second replica have nothing to write.
    assert bool(same) == (state.layout.data_rank == 0)
    return all(same) and (first.objects, first.common) == (later.objects, later.common)


def test_a_later_checkpoint_is_planned_as_the_first_one(config: RunConfig) -> None:
    config.trainer.devices, config.model.tensor_model_parallel_size, config.trainer.max_steps = 4, 2, 1
    assert [rank["seen"] for rank in run_ranks(4, train, config, planned_twice)] == [True] * 4


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit-flip": (lambda folder: flip(folder / "__1_0.distcp"), "'__1_0.distcp' is damaged"),
    "cut-off": (lambda folder: os.truncate(folder / "common.pt", 100), "'common.pt' is damaged"),
    "missing": (lambda folder: (folder / ".metadata").unlink(), "'.metadata' is missing"),
    "no-manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "garbage": (lambda folder: (shutil.rmtree(folder), folder.mkdir(), (folder / "x").mkdir()), "has no manifest.json"),
}


def find(runs: list[Path]) -> list[tuple[Path | None, list[str]]]:
    """In a rank: find the checkpoint from which a run in each folder would continue."""
    dist.init_process_group("gloo")
    return [find_newest_valid(run / "checkpoints") for run in runs]


def test_what_is_damaged_is_named_and_an_older_one_taken(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.devices, config.model.tensor_model_parallel_size = 4, 2
    config.exp_manager.checkpoint.keep_last = 0
    run_ranks(4, train, config)
    runs = [tmp_path / damage for damage in DAMAGE]
    for run, (harm, _) in zip(runs, DAMAGE.values()):
        shutil.copytree(tmp_path / "run", run)
        harm(run / "checkpoints" / "step_00000009")
        for name in ("step_", "step_x", "step_-0000001", "stepp_00000010"):
            (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / "step_00000012").write_text("a file")
    newest_by_rank = run_ranks(4, find, runs)
    assert all(one == newest_by_rank[0] for one in newest_by_rank)
    for run, (_, words), (folder, problems) in zip(runs, DAMAGE.values(), newest_by_rank[0]):
        assert folder == run / "checkpoints" / "step_00000006"
        assert len(problems) == 1 and "step_00000009" in problems[0] and words in problems[0]
    config.exp_manager.explicit_log_dir = str(runs[0])
    output, _ = run_ranks(4, train_and_tell, config)[0]
    [warning] = [line for line in output.splitlines() if line.startswith("warning") and "checkpoints" in line]
    assert newest_by_rank[0][0][1][0] in warning and "older checkpoint" in warning and "at step 6" in output
    assert figures(runs[0]) == figures(tmp_path / "run")
    assert store.newest_valid(runs[0] / "checkpoints") == (runs[0] / "checkpoints" / "step_00000009", [])
    for folder in store.committed(runs[1] / "checkpoints"):
        (folder / "__0_0.distcp").unlink()
    config.exp_manager.explicit_log_dir = str(runs[1])
    for _, error in run_ranks(4, train_and_tell, config):
        assert "No valid checkpoint is left" in error and "step_00000003" in error


@pytest.mark.slow
def test_none_left_ends_the_command_with_an_error(config: RunConfig, tmp_path: Path) -> None:
    run_ranks(1, train, config)
    for folder in store.committed(tmp_path / "run" / "checkpoints"):
        flip(folder / "__0_0.distcp")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))
    words = [sys.executable, "-m", "megatron_anymal", "pretrain", f"--config-path={tmp_path}", "--config-name=tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode > 0, done.stderr
    assert "No valid checkpoint is left" in done.stderr and "step_00000006" in done.stderr
    assert not (tmp_path / "run" / "run.lock").exists()
