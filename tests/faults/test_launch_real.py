"""Launched runs of a tiny AnyMAL that are killed, stopped, hung or refused: they end as one left alone, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from engine import train
from launched import differences, faults, launch, options, write_config
from ranks import run_ranks
from test_sigkill import figures, kill, steps_of

from megatron_anymal.config_io import compose
from megatron_anymal.resilience.events import read
from megatron_anymal.resilience.exit_codes import Exit

STEPS, EVERY = 14, 4
# Own times of a run: they differ.
HANG = ("resilience.hang_timeout=12",)


@pytest.fixture(scope="module")
def folder(
    mixed_shards: str, text_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    write_config(folder, mixed_shards, text_shards, tokenizer_folder, STEPS, EVERY)
    return folder


def whole(folder: Path, processes: int, *overrides: str) -> Path:
    """A run that nothing happens to; made once."""
    run = folder / f"whole_{processes}_{len(overrides)}"
    if not run.exists():
        config = compose("tiny", folder, [*options(run, processes), *overrides]).config
        run_ranks(processes, train, config, timeout=400)
    return run


def finish(process: subprocess.Popen[bytes], log: Path, code: int = 0, patience: float = 1200) -> str:
    try:
        assert process.wait(patience) == code, log.read_text()[-4000:]
    finally:
        kill(process)
    return log.read_text()


def same(run: Path, other: Path) -> None:
    assert figures(run) == figures(other)
    assert not differences(run, other)


def told(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read(run) if event["kind"] == kind]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while max(steps_of(run), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_one_rank_killed_goes_on_by_itself(folder: Path) -> None:
    run, log = folder / "one", folder / "one.log"
    process = launch(folder, run, 1, faults("kill:step=6"), log=log)
    finish(process, log)
    same(run, whole(folder, 1))
    [death] = told(run, "death")
    assert (death["signal"], death["step"]) == (9, 6)
    assert "rank 0, step 6, death" in (run / "report.md").read_text()


@pytest.mark.slow
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
    process = launch(folder, run, 4, faults(*planned), *long, log=log)
    finish(process, log, patience=3300)
    same(run, whole(folder, 4, *long))
    deaths, restarts = told(run, "death"), told(run, "restart")
    assert sorted((d["rank"], d["step"]) for d in deaths if "signal" in d) == sorted(zip(ranks, steps))
    assert len(restarts) == len(planned)
    # The others were gone within ten seconds.
    for attempt, restart in enumerate(restarts, 1):
        died = min(d["time"] for d in deaths if d["attempt"] == attempt)
        assert restart["time"] - died < 10


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_each_hang_is_found_blamed_and_leaves_no_trace(folder: Path) -> None:
    run, log = folder / "hung", folder / "hung.log"
    planned = (
        "stop:rank=1,step=5,place=compute",
        "loader_hang:rank=0,step=8",
        "gil:rank=1,step=10",
        "hang:rank=0,step=12,place=update",
    )
    process = launch(folder, run, 2, faults(*planned), *HANG, log=log)
    finish(process, log)
    same(run, whole(folder, 2))
    hangs = told(run, "hang")
    assert [(h["cause"], h["ranks"]) for h in hangs] == [
        ("stopped", [1]),
        ("data", [0]),
        ("gil", [1]),
        ("collective", [0]),
    ]
    report = (run / "report.md").read_text()
    assert "hang (stopped)" in report and all(Path(path).is_file() for h in hangs for path in h["stacks"].values())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_exception_that_came_first_is_reported_first(folder: Path) -> None:
    run, log = folder / "raised", folder / "raised.log"
    process = launch(folder, run, 2, faults("exception:rank=1,step=6", "loader_kill:rank=0,step=10"), *HANG, log=log)
    finish(process, log)
    same(run, whole(folder, 2))
    report = (run / "report.md").read_text()
    first, second = report.split("## What failed")[1].split("\n## ")[0].split("### ")[1:]
    assert first.startswith("Attempt 1: rank 1, step 6, exception") and "InjectedFault" in first
    assert second.startswith("Attempt 2: rank 0") and "worker" in second


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_on_request_and_started_again(folder: Path, number: signal.Signals) -> None:
    run, log = folder / f"asked_{number}", folder / f"asked_{number}.log"
    slow = faults("slow:rank=0,seconds=0.5,every=1")
    process = launch(folder, run, 2, slow, log=log)
    wait_for_step(run, 5, process)
    process.send_signal(number)
    finish(process, log, Exit.REQUEUE)
    reached = max(steps_of(run))
    assert 5 <= reached < STEPS and (run / "checkpoints" / f"step_{reached:08d}").is_dir()
    assert not told(run, "restart") and "Start the same command again" in (run / "report.md").read_text()
    finish(launch(folder, run, 2, slow, log=log), log)
    same(run, whole(folder, 2))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_of_two_launchers_in_one_folder_one_is_refused(folder: Path) -> None:
    run, log, late = folder / "shared", folder / "shared.log", folder / "late.log"
    first = launch(folder, run, 1, faults("slow:seconds=2,every=1"), log=log)
    wait_for_step(run, 1, first)
    owner = json.loads((run / "run.lock").read_text())
    said = finish(launch(folder, run, 1, log=late), late, Exit.LOCKED)
    assert f"process {owner['pid']}" in said and "in use by" in said
    finish(first, log)
    same(run, whole(folder, 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mistake_is_told_once(folder: Path) -> None:
    run, log = folder / "mistaken", folder / "mistaken.log"
    process = launch(folder, run, 2, f"data.train.mix.path={folder}/nowhere", log=log)
    said = finish(process, log, Exit.MISTAKE)
    assert "nowhere" in said and len(told(run, "start")) <= 1 and not told(run, "restart")
    # What the launcher sees by itself starts nothing.
    process = launch(folder, folder / "never", 2, "trainer.max_steps=0", log=log)
    assert "trainer.max_steps" in finish(process, log, Exit.MISTAKE) and not (folder / "never").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_that_always_fails_at_the_same_place_is_given_up(folder: Path) -> None:
    run, log = folder / "looping", folder / "looping.log"
    process = launch(folder, run, 1, faults("kill:step=6,every=1"), log=log)
    finish(process, log, Exit.CRASH_LOOP)
    assert len(told(run, "death")) == 4
    # It goes on from where it was once the cause is mended.
    finish(launch(folder, run, 1, log=log), log)
    same(run, whole(folder, 1))
