"""Heartbeats as the monitor reads them, including those of a stopped process or one whose GIL is held."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_anymal.checkpoint.async_writer import FolderLost, SaveFailed
from megatron_anymal.checkpoint.run_lock import FolderInUse
from megatron_anymal.checkpoint.store import CheckpointError, none_left
from megatron_anymal.config import ConfigError
from megatron_anymal.data.records import DataError
from megatron_anymal.modalities.base import MediaError
from megatron_anymal.resilience import events, heartbeat
from megatron_anymal.resilience.exit_codes import Exit, code_of
from megatron_anymal.resilience.failure_record import record_failure
from megatron_anymal.resilience.heartbeat import Phase
from megatron_anymal.resilience.nonfinite import NotFinite

ROOT = Path(__file__).parents[2]
# A rank with a fault in its seventh step.
RANK = """
import sys
from pathlib import Path
from megatron_anymal.resilience import heartbeat
from megatron_anymal.resilience import fault_injection
from megatron_anymal.resilience.heartbeat import Phase
run_dir, fault = Path(sys.argv[1]), sys.argv[2]
fault_injection.schedule([fault], 3, run_dir)
with heartbeat.publish(run_dir):
    for step in range(1, 10):
        heartbeat.beat(Phase.COMPUTE, step)
        fault_injection.inject("compute", step)
        heartbeat.beat(settled=True)
"""


@contextmanager
def rank(tmp_path: Path, fault: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    environment = {**os.environ, "RANK": "3", heartbeat.ENVIRONMENT: str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / "run"), fault], env=environment)
    try:
        yield process, tmp_path / "rank_00003"
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# A rank that sends heartbeats without a pause.
BUSY = """
import sys
from pathlib import Path
from megatron_anymal.resilience.heartbeat import Heartbeat, Phase
mine = Heartbeat(Path(sys.argv[1]), 1)
while True:
    mine.beat(Phase.COMPUTE, 500)
    mine._note_alive()
"""


def test_a_look_in_the_middle_of_a_beat_sees_no_silence(tmp_path: Path) -> None:
    path = tmp_path / "rank_00001"
    with subprocess.Popen([sys.executable, "-c", BUSY, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}) as busy:
        try:
            wait_for(lambda: (first := heartbeat.read(path)) is not None and first.step == 500)
            end, looks = time.monotonic() + 3, 0
            while time.monotonic() < end:
                seen, now = heartbeat.read(path), time.monotonic_ns()
                assert seen is not None and (seen.rank, seen.step, seen.phase) == (1, 500, Phase.COMPUTE)
                assert now - seen.beat_ns < 10**10 and now - seen.alive_ns < 10**10
                looks += 1
            assert looks > 100
        finally:
            busy.kill()


def age(nanoseconds: int) -> float:
    return (time.monotonic_ns() - nanoseconds) / 1e9


def at_step_seven(path: Path) -> bool:
    beat = heartbeat.read(path)
    return beat is not None and beat.step == 7


def test_round_trip(tmp_path: Path) -> None:
    writer = heartbeat.Heartbeat(tmp_path / "rank_00003", 3)
    before = time.monotonic_ns()
    writer.beat(Phase.VALIDATION, 12)
    beat = heartbeat.read(tmp_path / "rank_00003")
    assert beat is not None
    assert (beat.pid, beat.rank, beat.step, beat.phase, beat.settled) == (os.getpid(), 3, 12, Phase.VALIDATION, False)
    assert before <= beat.beat_ns <= time.monotonic_ns() and beat.alive_ns
    writer.beat(settled=True)
    later = heartbeat.read(tmp_path / "rank_00003")
    assert later is not None and later.progress == beat.progress + 1 and later.settled
    assert (later.step, later.phase) == (12, Phase.VALIDATION)
    wait_for(lambda: (heartbeat.read(tmp_path / "rank_00003") or beat).alive_ns > beat.alive_ns, 5)
    writer.close()
    # The documented file format.
    data = (tmp_path / "rank_00003").read_bytes()
    assert len(data) == 128 and data[:8] == b"anymal1\0"
    assert struct.unpack_from("<IIqIIq", data, 8) == (os.getpid(), 3, 12, 4, 1, later.progress)


def test_what_is_no_heartbeat(tmp_path: Path) -> None:
    assert heartbeat.read(tmp_path / "none") is None
    (tmp_path / "short").write_bytes(b"anymal1\0")
    (tmp_path / "other").write_bytes(bytes(128))
    assert heartbeat.read(tmp_path / "short") is None and heartbeat.read(tmp_path / "other") is None


def test_a_beat_costs_next_to_nothing(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        begun = time.process_time()
        for _ in range(count):
            heartbeat.beat(Phase.COMPUTE, 1)
        return (time.process_time() - begun) / count

    assert seconds(10_000) < 20e-6


def test_an_orderly_end(tmp_path: Path) -> None:
    with rank(tmp_path, "kill:step=99") as (process, path):
        assert process.wait(240) == 0
        beat = heartbeat.read(path)
        assert beat is not None and beat.phase is Phase.END and beat.settled
        assert not list((tmp_path / "run" / "stacks").iterdir())


@pytest.mark.parametrize(
    ("fault", "runs"), [("gil:rank=3,step=7", False), ("stop:rank=3,step=7", False), ("hang:rank=3,step=7", True)]
)
def test_what_stands_still_shows(tmp_path: Path, fault: str, runs: bool) -> None:
    with rank(tmp_path, fault) as (process, path):
        wait_for(lambda: at_step_seven(path))
        time.sleep(2)
        beat = heartbeat.read(path)
        assert beat is not None and beat.phase is Phase.COMPUTE and age(beat.beat_ns) > 1.5
        assert (age(beat.alive_ns) < 1.5) == runs
        if fault.startswith("stop"):
            return
        stacks = tmp_path / "run" / "stacks" / f"rank_00003_{process.pid}.txt"
        os.kill(process.pid, signal.SIGUSR2)
        wait_for(lambda: "fault_injection.py" in stacks.read_text())
        time.sleep(0.3)
        stack_traces = stacks.read_text()
        # The stacks of all threads are written, and the signal does not end the fault.
        assert "in _hold_gil" in stack_traces or "in _sleep" in stack_traces
        assert "heartbeat.py" in stack_traces and process.poll() is None
        still = heartbeat.read(path)
        assert still is not None and still.progress == beat.progress


def test_without_the_launcher_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heartbeat.ENVIRONMENT, raising=False)
    before = signal.getsignal(signal.SIGUSR2)
    with heartbeat.publish(tmp_path / "run"):
        heartbeat.beat(Phase.DATA, 1)
    signal.signal(signal.SIGUSR2, before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_which_exception_ends_with_which_code() -> None:
    codes = {
        ConfigError("x"): 2,
        DataError("x"): 2,
        MediaError("x"): 2,
        CheckpointError("x"): 2,
        none_left(["x"]): 78,
        FolderInUse("x"): 80,
        FolderLost("x"): 80,
        SaveFailed("x"): 81,
        NotFinite("x"): 77,
        RuntimeError("x"): 1,
        MemoryError(): 1,
    }
    assert {error: int(code_of(error)) for error in codes} == codes
    assert {code for code in Exit if code.restarts} == {Exit.CRASH, Exit.HANG}
    assert all(code.meaning for code in Exit)


def test_an_exception_is_recorded_once_with_its_traceback(tmp_path: Path) -> None:
    try:
        raise RuntimeError("seven\nlines")
    except RuntimeError as error:
        record_failure(tmp_path, error, 7)
        record_failure(tmp_path, error)
        # No folder is created for a run that failed before it started, for example because of a configuration error.
        record_failure(tmp_path / "none", RuntimeError("x"))
    [event] = events.read(tmp_path)
    assert (event["kind"], event["text"], event["step"]) == ("exception", "RuntimeError: seven lines", 7)
    assert event["exit_code"] == 1 and "test_rank_heartbeat.py" in event["traceback"]
    assert not (tmp_path / "none").exists()
