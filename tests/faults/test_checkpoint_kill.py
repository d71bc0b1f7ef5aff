"""A job killed at any point while it writes a checkpoint resumes from the previous one, with the same results."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cuts import Disk, Operation, die, run_until_killed
from engine import train
from ranks import run_ranks
from test_sigkill import figures
from tiny import make_config

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.async_writer import CheckpointWriter, Save
from megatron_anymal.checkpoint.snapshot import Plan, Snapshot
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.config import RunConfig
from megatron_anymal.safetensors_io import HashedFile
from megatron_anymal.train import loop


@pytest.fixture(scope="module")
def config(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Nine steps, a checkpoint every three steps, and only the newest one kept."""
    config = make_config(mixed_shards, tokenizer_folder, tmp_path_factory.mktemp("kill") / "run")
    config.trainer.max_steps = 9
    config.exp_manager.checkpoint.keep_last = 1
    return config


def of(config: RunConfig, run: Path, processes: int = 1) -> RunConfig:
    config = copy.deepcopy(config)
    config.exp_manager.explicit_log_dir, config.trainer.devices = str(run), processes
    return config


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Path:
    """The undisturbed run."""
    run = Path(config.exp_manager.explicit_log_dir)
    run_ranks(1, train, config)
    return run


def kill_in_forks(base: Path, snapshot: Snapshot, manifest: Manifest, rules: Any, chosen: Any) -> list[Operation]:
    """Write a checkpoint once undisturbed, and once per chosen operation with a kill at that operation.

    Each write goes to its own copy of the run's folder. Returns all operations of the undisturbed write.
    """

    def write(run: Path, meet: Callable[[Operation], None]) -> Disk:
        checkpoints = run / "checkpoints"
        disk = Disk(checkpoints, meet)
        writer = CheckpointWriter(checkpoints, rules, print, guard=lambda: None)
        folders = (
            folder_of(checkpoints, manifest.step) for folder_of in (store.staging_folder, store.committed_folder)
        )
        # A save number that is unique in this process.
        save = Save(10_000 + os.getpid(), manifest, *folders, snapshot, "", 0.0)
        disk.install()
        writer._work(save)
        assert save.verdict is not None and not save.verdict.error, save.verdict
        return disk

    def forked(do: Callable[[], Any]) -> int:
        child = os.fork()
        if not child:
            try:
                do()
                os._exit(0)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(3)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    listed = base / "operations"

    def list_all() -> None:
        seen = write(base / "undisturbed", lambda operation: None).seen
        listed.write_text("\n".join(f"{one.kind} {one.path}" for one in seen))

    shutil.copytree(base / "run", base / "undisturbed")
    assert forked(list_all) == 0
    operations = [Operation(n, *line.split(" ", 1)) for n, line in enumerate(listed.read_text().splitlines())]
    for operation in chosen(operations):
        run = base / f"cut{operation.number}"
        shutil.copytree(base / "run", run)

        def killed(run: Path = run, last: int = operation.number) -> None:
            def meet(now: Operation) -> None:
                if now.number == last:
                    disks[0].lose_power()
                    die()

            disks: list[Disk] = []
            real = Disk.install

            def install(disk: Disk) -> None:
                disks.append(disk)
                real(disk)

            Disk.install = install  # type: ignore[method-assign]
            write(run, meet)

        assert forked(killed) == -9, operation
    return operations


def kill_at(config: RunConfig, base: Path, chosen: Any) -> list[Operation]:
    """In a rank: train up to the second checkpoint, then write it in forks that are killed."""
    seen: list[Operation] = []

    def start(writer: CheckpointWriter, state: Any, manifest: Manifest) -> None:
        if manifest.step != 6:
            begin(writer, state, manifest)
            return
        writer._settle()
        seen.extend(kill_in_forks(base, Plan(state, 6).copy(), manifest, writer.rules, chosen))
        # The rest of this run does not matter.
        state.step = 9

    begin = CheckpointWriter.start
    CheckpointWriter.start = start  # type: ignore[method-assign]
    train(of(config, base / "run"))
    return seen


def few(operations: Sequence[Operation]) -> list[Operation]:
    """Choose all operations but writes, and the first, the last and some other writes of each file."""
    chosen = []
    writes = Counter(one.path for one in operations if one.kind == "write")
    done: Counter[str] = Counter()
    for one in operations:
        if one.kind == "write":
            done[one.path] += 1
            if done[one.path] not in (1, writes[one.path]) and done[one.path] % 97:
                continue
        chosen.append(one)
    return chosen


def all_of_them(operations: Sequence[Operation]) -> list[Operation]:
    return list(operations)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("chosen", [few, pytest.param(all_of_them, marks=pytest.mark.slow)])
def test_killed_at_every_write_sync_and_rename(
    config: RunConfig, whole: Path, tmp_path: Path, chosen: Callable[[Sequence[Operation]], list[Operation]]
) -> None:
    operations = run_ranks(1, kill_at, config, tmp_path, chosen, timeout=1000)[0]
    kinds = Counter(one.kind for one in operations)
    # Syncs: five files (chunks, .metadata, common.pt, metadata.json, the manifest), two folders, and one more folder
    # when the old checkpoint is deleted.
    assert kinds["write"] > 100 and kinds["fsync"] == 5 + 2 + 1 and kinds["rename"] == 2, kinds
    [commit, retire] = [one.number for one in operations if one.kind == "rename"]
    runs = sorted(tmp_path.glob("cut*"), key=lambda run: int(run.name.removeprefix("cut")))
    assert len(runs) == len(chosen(operations))
    for run in runs:
        at = int(run.name.removeprefix("cut"))
        folder, problems = store.newest_valid(run / "checkpoints")
        assert folder is not None and not problems, (operations[at], problems)
        assert store.step_of(folder) == (3 if at <= commit else 6), operations[at]
        names = {path.name for path in store.committed(run / "checkpoints")}
        assert ("step_00000003" in names) == (at <= retire), operations[at]
    # Continue the runs killed before the first sync and after the commit; with all operations, also those killed within
    # a file, before the commit, and during the deletion.
    sync = next(one.number for one in operations if one.kind == "fsync")
    for at in (sync, commit + 1) if chosen is few else (sync - 9, sync, commit, commit + 1, retire + 2):
        run_ranks(1, train, of(config, tmp_path / f"cut{at}"))
        assert figures(tmp_path / f"cut{at}") == figures(whole), operations[at]
        assert [p.name for p in (tmp_path / f"cut{at}" / "checkpoints").iterdir()] == ["step_00000009"]


def killed_on_rank(config: RunConfig, rank: int, step: int, kind: str, count: int) -> None:
    """In a rank: train; one rank dies at the `count`-th operation of a kind in the checkpoint of `step`."""
    if int(os.environ["RANK"]) == rank:
        folder = Path(config.exp_manager.explicit_log_dir) / "checkpoints"
        seen = 0

        def meet(operation: Operation) -> None:
            nonlocal seen
            seen += operation.kind == kind and f"{step:08d}" in operation.path
            if seen == count:
                die()

        Disk(folder, meet).install()
    train(config)


# Rank 0 dies in its own file, at the index, and before the commit; rank 1 in its file. The second replica writes
# nothing.
CUTS = [(0, "write", 40), (0, "fsync", 3), (0, "rename", 1), (1, "write", 40), (1, "fsync", 1)]


@pytest.fixture(scope="module")
def whole_of_four(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of four ranks."""
    run = tmp_path_factory.mktemp("four")
    run_ranks(4, train, of_four(config, run))
    return run


def of_four(config: RunConfig, run: Path) -> RunConfig:
    config = of(config, run, 4)
    config.model.tensor_model_parallel_size = 2
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "kind", "count"), CUTS)
def test_a_job_of_four_ranks_killed_in_a_save(
    config: RunConfig, whole_of_four: Path, tmp_path: Path, rank: int, kind: str, count: int
) -> None:
    run = of_four(config, tmp_path / "run")
    run_until_killed(4, killed_on_rank, run, rank, 6, kind, count)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert store.newest_valid(checkpoints) == (store.committed_folder(checkpoints, 3), [])
    assert list(checkpoints.glob(".staging_00000006"))
    run_ranks(4, train, run)
    assert figures(tmp_path / "run") == figures(whole_of_four)


def killed_while_writing(config: RunConfig) -> None:
    """In a rank: train with a slow write of the second checkpoint, and die one step later."""
    close, step = HashedFile.close, loop.train_step

    def slow(file: HashedFile) -> str:
        if "00000006" in str(file._file.name):
            time.sleep(30)
        return close(file)

    def last(state: Any, *arguments: Any) -> Any:
        result = step(state, *arguments)
        if state.step == 7:
            die()
        return result

    HashedFile.close, loop.train_step = slow, last  # type: ignore[method-assign]
    train(config)


def test_killed_a_step_after_a_save_began(config: RunConfig, whole: Path, tmp_path: Path) -> None:
    run = of(config, tmp_path / "run")
    run_until_killed(1, killed_while_writing, run)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [".staging_00000006", "step_00000003"]
    assert len(figures(tmp_path / "run")) == 6
    run_ranks(1, train, run)
    assert figures(tmp_path / "run") == figures(whole)
