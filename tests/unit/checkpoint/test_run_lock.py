"""Only one job at a time uses a run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_anymal.checkpoint.run_lock import LOCK, LockLost, Owner, RunLock
from megatron_anymal.config import ConfigError


def owner(**changes: Any) -> Owner:
    """Owner record of a live process: this test's parent."""
    parent = psutil.Process(os.getppid())
    me = replace(
        Owner.this_process(), pid=parent.pid, began=parent.create_time(), user="ann", since="2026-01-02T03:04:05"
    )
    return replace(me, **changes)


def place(run: Path, lock_owner: Owner) -> Path:
    run.mkdir(exist_ok=True)
    path = run / LOCK
    path.write_text(json.dumps(asdict(lock_owner)))
    return path


def gone() -> tuple[int, float]:
    """Process id and start time of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = psutil.Process(process.pid).create_time()
    process.communicate(b"\n")
    return process.pid, began


def test_taken_and_given_back(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run", 60)
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    lock.check()
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_job_is_refused_at_once_and_told_whose_the_folder_is(tmp_path: Path) -> None:
    place(tmp_path, owner(job="4711"))
    begun = time.monotonic()
    with pytest.raises(ConfigError) as error:
        RunLock(tmp_path, 60)
    assert time.monotonic() - begun < 40
    for words in (
        str(tmp_path),
        f"process {os.getppid()} on",
        "user ann",
        "Slurm job 4711",
        "since 2026-01-02T03:04:05",
    ):
        assert words in str(error.value)


def test_of_two_processes_one_gets_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_anymal.checkpoint.run_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]), 60)\nprint('taken', flush=True)\ninput()\nlock.release()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as first:
        assert first.stdout is not None and first.stdout.readline() == b"taken\n"
        with pytest.raises(ConfigError, match=f"process {first.pid} on"):
            RunLock(tmp_path, 60)
        first.kill()
        first.wait(240)
        messages: list[str] = []
        lock = RunLock(tmp_path, 60, messages.append)
        assert len(messages) == 1 and f"process {first.pid}" in messages[0] and "which has ended" in messages[0]
        lock.release()


def test_a_dead_owners_lock_is_taken_over_at_once(tmp_path: Path) -> None:
    pid, began = gone()
    place(tmp_path, owner(pid=pid, began=began))
    messages: list[str] = []
    begun = time.monotonic()
    RunLock(tmp_path, 60, messages.append).release()
    assert time.monotonic() - begun < 40
    assert len(messages) == 1 and "taking over" in messages[0] and f"process {pid}" in messages[0]


def test_a_number_used_again_is_not_the_owner(tmp_path: Path) -> None:
    place(tmp_path, owner(began=1.0))
    RunLock(tmp_path, 60, [].append).release()


def test_a_slurm_job_started_anew_takes_over_from_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, owner(host="node7", job="4711", restart=0))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begun = time.monotonic()
    RunLock(tmp_path, 60, [].append).release()
    assert time.monotonic() - begun < 40


# Another machine, or a container with its own process ids.
@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"boot": "another"}])
def test_a_crashed_machines_lock_does_not_block_for_ever(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    place(tmp_path, owner(**elsewhere))
    messages: list[str] = []
    begun = time.monotonic()
    lock = RunLock(tmp_path, 1.5, messages.append)
    assert 1.5 <= time.monotonic() - begun < 40
    assert "waiting up to 1.5 s" in messages[0] and "gave no sign of life for 1.5 s" in messages[1]
    lock.check()
    lock.release()


def test_a_living_owner_elsewhere_is_noticed_before_the_time_is_over(tmp_path: Path) -> None:
    path = place(tmp_path, owner(host="node7"))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.3):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        begun = time.monotonic()
        with pytest.raises(ConfigError, match="on node7"):
            RunLock(tmp_path, 60, [].append)
        assert time.monotonic() - begun < 40
    finally:
        stop.set()
        thread.join()


def test_the_owner_gives_signs_of_life(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 0.8)
    before = (tmp_path / LOCK).stat().st_mtime_ns
    time.sleep(0.5)
    assert (tmp_path / LOCK).stat().st_mtime_ns > before
    lock.release()


def test_a_damaged_lock_is_taken_over_once_nobody_touches_it(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(b"\x00\xff{")
    messages: list[str] = []
    RunLock(tmp_path, 1.0, messages.append).release()
    assert "unknown job" in messages[0]


def test_an_owner_that_was_taken_over_finds_out_and_leaves_the_new_ones_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 60)
    place(tmp_path, owner(host="node7", token="new"))
    with pytest.raises(LockLost, match=r"taken over by process .* on node7"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).is_file()


def test_a_lock_deleted_by_hand_is_made_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 60)
    (tmp_path / LOCK).unlink()
    lock.check()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
