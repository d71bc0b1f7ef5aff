"""Launched runs of a tiny AnyMAL that are killed, stopped or hung end bit-identical to an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from engine import train
from launched import assert_same, faults, finish, launch, options, rank_processes, told, wait_for_step, write_config
from ranks import run_ranks
from test_sigkill import steps_of

from megatron_anymal.checkpoint import store
from megatron_anymal.config.compose import compose
from megatron_anymal.resilience.exit_codes import Exit

PROCESSES, STEPS, EVERY = 4, 14, 4
# Hang timeout in seconds; it does not affect results.
TIMEOUT = 12.0
HANG = f"resilience.hang_timeout={TIMEOUT}"
# Makes steps long enough for a signal to arrive during one; does not change any results.
SLOW = "slow:rank=0,seconds=0.5,every=1"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(
    mixed_shards: str, text_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    write_config(folder, mixed_shards, text_shards, tokenizer_folder, STEPS, EVERY)
    return folder


def left_alone(folder: Path, *overrides: str) -> Path:
    """Return an undisturbed run with the same layout."""
    run = folder / f"whole_{len(overrides)}"
    if not run.exists():
        run_ranks(PROCESSES, train, compose("tiny", folder, [*options(run, PROCESSES), *overrides]).config, timeout=400)
    return run


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return left_alone(folder)


@pytest.mark.timeout(3600)
def test_killed_twenty_times_each_rank_four_times_or_more(folder: Path) -> None:
    run, log = folder / "often", folder / "often.log"
    dice = random.Random(7)
    ranks = [0, 1, 2, 3] * 5
    dice.shuffle(ranks)
    steps = sorted(dice.sample(range(1, 60), len(ranks)))
    places = ("data", "compute", "update")
    planned = [f"kill:rank={r},step={s},place={dice.choice(places)}" for r, s in zip(ranks, steps)]
    long = ("trainer.max_steps=60", "exp_manager.checkpoint.every_n_train_steps=3")
    process = launch(folder, run, PROCESSES, faults(*planned), *long, log=log)
    finish(process, log, patience=3300)
    assert_same(run, left_alone(folder, *long))
    deaths, restarts = told(run, "death"), told(run, "restart")
    assert sorted((d["rank"], d["step"]) for d in deaths if "signal" in d) == sorted(zip(ranks, steps))
    assert len(restarts) == len(planned)
    # The other ranks were gone within ten seconds.
    for attempt, restart in enumerate(restarts, 1):
        died = min(d["time"] for d in deaths if d["attempt"] == attempt)
        assert restart["time"] - died < 10


def test_each_hang_and_failure_is_blamed_and_leaves_no_trace(folder: Path, whole: Path) -> None:
    run, log = folder / "hung", folder / "hung.log"
    hanging = (
        "stop:rank=1,step=3,place=compute",
        "loader_hang:rank=2,step=6",
        "gil:rank=3,step=8",
        "hang:rank=0,step=10,place=update",
    )
    failing = ("exception:rank=2,step=11", "loader_kill:rank=1,step=14")
    finish(launch(folder, run, PROCESSES, faults(*hanging, *failing), HANG, log=log), log)
    assert_same(run, whole)
    # The time at which each fault happened.
    happened = [(run / "faults" / fault.replace(":", "_")).stat().st_mtime for fault in (*hanging, *failing)]
    hangs = told(run, "hang")
    blamed = [("stopped", [1]), ("data", [2]), ("gil", [3]), ("collective", [0])]
    assert [(hang["cause"], hang["ranks"]) for hang in hangs] == blamed
    for hang, since in zip(hangs, happened):
        silent = re.search(r"silent for ([\d.]+) s", hang["text"])
        assert silent and TIMEOUT <= float(silent[1]) < TIMEOUT + 5, hang
        # A loader process works some steps ahead of its rank, so the rank hangs later.
        assert hang["cause"] == "data" or hang["time"] - since < TIMEOUT + 5, hang
    assert all(Path(path).is_file() for hang in hangs for path in hang["stacks"].values())
    report = (run / "report.md").read_text()
    stopped, *_, raised, lost = report.split("## What failed")[1].split("\n## ")[0].split("### ")[1:]
    assert stopped.startswith("Attempt 1: rank 1, step 3, hang (stopped)")
    # The first failure is reported first, with its traceback.
    assert raised.startswith("Attempt 5: rank 2, step 11, exception") and "InjectedFault" in raised
    assert raised.index("Traceback") < raised.index("Afterwards, and probably as a consequence")
    assert lost.startswith("Attempt 6: rank 1") and "killed by a signal" in lost
    [died] = [event for event in told(run, "exception") if "WorkerDied" in event["text"]]
    assert died["time"] - happened[-1] < 5


def test_stopped_on_request_and_started_again(folder: Path, whole: Path) -> None:
    """Stop requests to a rank during start-up, to the launcher, which forwards it, and to another rank in a step."""
    run, log = folder / "asked", folder / "asked.log"
    process = launch(folder, run, PROCESSES, faults(SLOW), log=log)
    deadline = time.monotonic() + 240
    while len(ranks := rank_processes(process.pid)) < PROCESSES:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(ranks[3], signal.SIGTERM)
    finish(process, log, Exit.REQUEUE)
    assert not steps_of(run)
    for step, number, by in ((2, signal.SIGTERM, None), (7, signal.SIGUSR1, 2)):
        process = launch(folder, run, PROCESSES, faults(SLOW), log=log)
        wait_for_step(run, step, process)
        os.kill(process.pid if by is None else rank_processes(process.pid)[by], number)
        asked = time.monotonic()
        finish(process, log, Exit.REQUEUE)
        # Enough for a step, a save and the exit of four processes.
        assert time.monotonic() - asked < 30
        reached = max(steps_of(run))
        assert step <= reached < STEPS
        saved = store.committed_folder(run / "checkpoints", reached)
        assert store.newest_valid(run / "checkpoints") == (saved, [])
        assert "Start the same command again" in (run / "report.md").read_text()
    finish(launch(folder, run, PROCESSES, faults(SLOW), log=log), log)
    # torchrun would report a stop as a failure.
    assert "failed (exitcode" not in log.read_text()
    assert not told(run, "death") and not told(run, "restart")
    assert_same(run, whole)


def test_of_two_launchers_in_one_folder_one_is_refused(folder: Path, whole: Path) -> None:
    run, log, late = folder / "shared", folder / "shared.log", folder / "late.log"
    first = launch(folder, run, PROCESSES, faults(SLOW), log=log)
    wait_for_step(run, 1, first)
    # Pause the first run for as long as the second one takes to start.
    held = rank_processes(first.pid)[3]
    os.kill(held, signal.SIGSTOP)
    owner = json.loads((run / "run.lock").read_text())
    output = finish(launch(folder, run, PROCESSES, log=late), late, Exit.LOCKED)
    assert f"process {owner['pid']}" in output and "in use by" in output
    os.kill(held, signal.SIGCONT)
    finish(first, log)
    assert_same(run, whole)


def test_a_mistake_is_told_once(folder: Path) -> None:
    run, log = folder / "mistaken", folder / "mistaken.log"
    process = launch(folder, run, PROCESSES, f"data.train.mix.path={folder}/nowhere", log=log)
    output = finish(process, log, Exit.MISTAKE)
    assert "nowhere" in output and len(told(run, "start")) <= 1 and not told(run, "restart")
    # The launcher starts nothing if it finds the mistake itself.
    process = launch(folder, folder / "never", PROCESSES, "trainer.max_steps=0", log=log)
    assert "trainer.max_steps" in finish(process, log, Exit.MISTAKE) and not (folder / "never").exists()


def test_a_run_that_always_fails_at_the_same_place_is_given_up(folder: Path, whole: Path) -> None:
    run, log = folder / "looping", folder / "looping.log"
    finish(launch(folder, run, PROCESSES, faults("kill:rank=1,step=6,every=1"), log=log), log, Exit.CRASH_LOOP)
    assert len([death for death in told(run, "death") if "signal" in death]) == 4
    # Once the cause is fixed, the run continues from its last checkpoint.
    finish(launch(folder, run, PROCESSES, log=log), log)
    assert_same(run, whole)
