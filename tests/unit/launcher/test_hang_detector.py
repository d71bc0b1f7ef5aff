"""Hangs are found, their cause named and the right rank blamed, using only external views of the ranks."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_anymal.config import ResilienceConfig
from megatron_anymal.launcher.hang_detector import (
    RankView,
    catches,
    diagnose,
    dump_stacks,
    hanging,
    main_stack,
    process_state,
)
from megatron_anymal.resilience.heartbeat import Beat, Phase

WAITING = (
    "/x/torch/distributed/distributed_c10d.py:2806 in all_reduce",
    "/x/megatron_anymal/train/step.py:90 in train",
)
BUSY = ("/x/megatron_anymal/train/step.py:70 in train",)
LOADING = (
    "/x/python3.11/multiprocessing/connection.py:9 in poll",
    "/x/torch/utils/data/dataloader.py:1135 in _try_get",
)
LIMITS = ResilienceConfig(hang_timeout=10, startup_timeout=100, checkpoint_timeout=50)


def view(
    rank: int,
    phase: Phase = Phase.COMPUTE,
    step: int = 7,
    *,
    silent: float = 11.0,
    held: float = 0.3,
    state: str = "S",
    stack: tuple[str, ...] = (),
    settled: bool = True,
    beats: bool = True,
) -> RankView:
    beat = Beat(100 + rank, rank, step, phase, settled, 5, 0, 0) if beats else None
    return RankView(rank, 100 + rank, beat, silent, held, state, stack)


@pytest.mark.parametrize(
    "views, expected",
    [
        ([view(0), view(1)], True),
        ([view(0, silent=9), view(1, silent=9)], False),
        # Each phase has its own timeout.
        ([view(0, Phase.CHECKPOINT, silent=40)], False),
        ([view(0, Phase.CHECKPOINT, silent=51)], True),
        ([view(0, Phase.LOADING, silent=99)], False),
        ([view(0, beats=False, silent=101)], True),
        # The first step may take long.
        ([view(0, settled=False, silent=60)], False),
        # Waiting for a rank that still has time; a rank that no other rank waits for.
        ([view(0, Phase.VALIDATION, silent=11), view(1, Phase.DATA, silent=3)], False),
        ([view(0, Phase.CHECKPOINT, 6, silent=40), view(1, Phase.DATA, 7, silent=11)], False),
        ([view(0, Phase.CHECKPOINT, 7, silent=1), view(1, Phase.DATA, 7, silent=11)], True),
        # A stopped process does not profit from more time, and does not wait for a rank that has it.
        ([view(0, Phase.CHECKPOINT, silent=12, held=11, state="T")], True),
        ([view(0, settled=False, held=11, state="t"), view(1, Phase.CHECKPOINT, 6, silent=11)], True),
        # Counted since the last sign of any of its threads; a process that a debugger stops briefly is not reported.
        ([view(0, silent=9, held=11, state="T")], False),
        ([view(0, Phase.CHECKPOINT, silent=12, held=9, state="t")], False),
        ([view(0, Phase.CHECKPOINT, silent=12, held=11)], False),
    ],
)
def test_silence_is_noticed_in_time(views: list[RankView], expected: bool) -> None:
    assert hanging(views, LIMITS) is expected


def test_watching_can_be_switched_off() -> None:
    assert not hanging([view(0, silent=1e6)], ResilienceConfig(hang_timeout=0))


@pytest.mark.parametrize(
    "views, cause, ranks",
    [
        ([view(0, stack=WAITING), view(1, state="T", held=11.0)], "stopped", (1,)),
        ([view(0, stack=WAITING), view(1, held=10.8)], "gil", (1,)),
        ([view(0, stack=WAITING), view(1, Phase.DATA, stack=LOADING)], "data", (1,)),
        # The other stages of the pipeline go on with their step without the media.
        ([view(0, Phase.DATA), view(1, Phase.UPDATE, stack=WAITING), view(2, Phase.DATA)], "data", (0, 2)),
        ([view(0, Phase.CHECKPOINT, stack=WAITING), view(1, Phase.CHECKPOINT, stack=BUSY)], "checkpoint", (1,)),
        ([view(0, stack=BUSY), view(1, stack=WAITING), view(2, stack=WAITING)], "collective", (0,)),
        ([view(0, step=8, stack=WAITING), view(1, step=7, stack=BUSY)], "collective", (1,)),
        # A rank waiting at an earlier collective operation than the others waits for one that skipped it.
        ([view(0, Phase.COMPUTE, stack=WAITING), view(1, Phase.UPDATE, stack=BUSY)], "collective", (1,)),
        ([view(0, stack=WAITING), view(1, stack=WAITING)], "collective", ()),
        ([view(0, Phase.VALIDATION, stack=WAITING), view(1, Phase.VALIDATION, stack=LOADING)], "data", (1,)),
        ([view(0, Phase.LOADING, -1, stack=WAITING), view(1, beats=False)], "startup", (1,)),
        ([view(0, Phase.START, -1, stack=BUSY), view(1, Phase.LOADING, -1, stack=WAITING)], "startup", (0,)),
        # If there are two possible causes, the more obvious one is named.
        ([view(0, state="T", held=11), view(1, Phase.DATA, stack=LOADING)], "stopped", (0,)),
    ],
)
def test_the_rank_that_the_others_wait_for_is_blamed(views: list[RankView], cause: str, ranks: tuple[int, ...]) -> None:
    hang = diagnose(views, {})
    assert (hang.cause, hang.ranks) == (cause, ranks), hang.text
    for rank in ranks:
        assert f"rank {rank} " in hang.text


def test_the_main_threads_stack_is_read(tmp_path: Path) -> None:
    def elsewhere() -> None:
        time.sleep(1.0)

    other = threading.Thread(target=elsewhere)
    other.start()
    with (tmp_path / "dump").open("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(file, all_threads=True)
    other.join()
    frames = main_stack((tmp_path / "dump").read_text())
    assert "test_the_main_threads_stack_is_read" in frames[0]
    assert not any("elsewhere" in frame for frame in frames)


RANK = """
import faulthandler, signal, sys, time
if len(sys.argv) > 1:
    faulthandler.register(signal.SIGUSR2, file=open(sys.argv[1], "a"))
print("ready", flush=True)
def here():
    time.sleep(60)
here()
"""


def start_rank(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", RANK, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_stacks_are_asked_for_only_where_they_can_be_given(tmp_path: Path) -> None:
    """Processes without a handler and stopped processes are left alone."""
    plain = start_rank()
    talking = start_rank(str(tmp_path / "talking"))
    stopped = start_rank(str(tmp_path / "stopped"))
    processes = [plain, talking, stopped]
    try:
        os.kill(stopped.pid, signal.SIGSTOP)
        while process_state(stopped.pid) != "T":
            time.sleep(0.01)
        names = {rank: tmp_path / f"rank_{rank:05d}_{p.pid}.txt" for rank, p in enumerate(processes)}
        (tmp_path / "talking").rename(names[1])
        views = [RankView(rank, p.pid, None, 11.0, 0.0, process_state(p.pid)) for rank, p in enumerate(processes)]
        assert [catches(p.pid, signal.SIGUSR2) for p in processes] == [False, True, True]
        seen, files = dump_stacks(views, tmp_path)
        assert files == {1: str(names[1])}
        assert [bool(v.stack) for v in seen] == [False, True, False]
        assert seen[1].stack[0].endswith("in here")
        assert plain.poll() is None and process_state(stopped.pid) == "T"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert process_state(plain.pid) == ""
