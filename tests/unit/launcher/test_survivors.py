"""A rank that has lost a peer keeps its process for the next attempt if it is invited, and only then."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_anymal.config import ResilienceConfig
from megatron_anymal.launcher import standby as standbys
from megatron_anymal.launcher.attempt import Attempt
from megatron_anymal.launcher.job import Decision, Job
from megatron_anymal.launcher.standby import Forked, Standby, fork
from megatron_anymal.launcher.stop_requests import StopRequests
from megatron_anymal.launcher.supervisor import Supervisor
from megatron_anymal.launcher.survivors import Survivors, socket_for, socket_of
from megatron_anymal.resilience import survival
from megatron_anymal.resilience.events import ATTEMPT
from megatron_anymal.resilience.exit_codes import Exit

HERE, TARGET, RANK = Path(__file__).parent, "survivor_target", 3


@pytest.fixture(scope="module")
def standby() -> Iterator[Standby]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    process = Standby(environment, ["torch.distributed", "megatron_anymal.parallel"], print)
    assert process.wait(lambda: None, 100.0)
    yield process
    process.close()


@pytest.fixture
def survivors(standby: Standby) -> Iterator[Survivors]:
    survivors = Survivors(standby.folder)
    yield survivors
    survivors.dismiss()
    for path in standby.folder.glob("stay_*"):
        path.unlink()


def begin(standby: Standby, socket: Path, folder: Path, *arguments: str, **more: str) -> Forked:
    """Have a process take on the role of the rank, through the standby process or the socket of one that stayed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "RANK": str(RANK),
        ATTEMPT: "1",
        standbys.SOCKET: str(standby.socket),
        survival.ENVIRONMENT: str(standby.folder),
        **more,
    }
    folder.mkdir()
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        forked = fork(str(socket), TARGET, arguments, environment, folder, [out.fileno(), err.fileno()])
    assert forked is not None
    return forked


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("what", ["peer", "store", "cause"])
def test_a_rank_that_is_invited_takes_part_in_the_next_attempt(
    what: str, standby: Standby, survivors: Survivors, tmp_path: Path
) -> None:
    survivors.invite(1)
    first = begin(standby, standby.socket, tmp_path / "first", what)
    wait_for(survivors.waiting)
    assert survivors.waiting() == {RANK: first.pid} and psutil.Process(first.pid).num_threads() >= 1
    waiting = socket_for({survival.ENVIRONMENT: str(standby.folder), "RANK": str(RANK)})
    assert waiting == socket_of(standby.folder, RANK, first.pid)
    # Another rank's socket is not taken.
    assert socket_for({survival.ENVIRONMENT: str(standby.folder), "RANK": "4"}) is None
    again = begin(standby, waiting, tmp_path / "again", "7", NEW="a new variable")
    assert again.pid == first.pid and again.wait(240) == 7
    expected_output = f"again {first.pid} {RANK} ['7'] {os.getcwd()} a new variable\n"
    assert (tmp_path / "again" / "out").read_text() == expected_output
    assert (tmp_path / "again" / "err").read_text() == "left the job\n"
    # Its end is noted for the new attempt only, and it has left no socket.
    assert not list((tmp_path / "first").glob("exit_*")) and not survivors.waiting()


@pytest.mark.parametrize(("what", "attempt"), [("own", 1), ("mistake", 1), ("peer", 2)])
def test_a_rank_that_failed_for_another_reason_or_is_not_invited_ends(
    what: str, attempt: int, standby: Standby, survivors: Survivors, tmp_path: Path
) -> None:
    survivors.invite(attempt)
    process = begin(standby, standby.socket, tmp_path / "first", what)
    assert process.wait(240) == 1 and (tmp_path / "first" / "out").read_text().endswith("ends\n")
    assert not survivors.waiting()


@pytest.mark.parametrize(
    ("what", "left"), [("thread", "threads: ['forgotten']\n"), ("group", "threads of gloo's process groups: 2\n")]
)
def test_a_rank_in_which_something_is_left_ends(
    what: str, left: str, standby: Standby, survivors: Survivors, tmp_path: Path
) -> None:
    survivors.invite(1)
    process = begin(standby, standby.socket, tmp_path / "first", what)
    assert process.wait(240) == 1
    assert (
        f"cannot stay for the next attempt, because something from this one is left: {left}"
        in (tmp_path / "first" / "err").read_text()
    )


def test_a_rank_without_a_place_is_dismissed(standby: Standby, survivors: Survivors, tmp_path: Path) -> None:
    survivors.invite(1)
    process = begin(standby, standby.socket, tmp_path / "first", "peer")
    wait_for(survivors.waiting)
    survivors.dismiss(but=[process.pid])
    assert survivors.waiting() == {RANK: process.pid}
    survivors.dismiss()
    assert process.wait(240) == -9 and not survivors.waiting()


@pytest.mark.parametrize(("settled", "invited"), [([True, True], True), ([True, False], False)])
def test_nobody_is_invited_before_every_rank_has_finished_a_step(
    settled: list[bool], invited: bool, tmp_path: Path
) -> None:
    planned: Any = Job(tmp_path / "run", ResilienceConfig(), ["-m", "program"], processes=2)
    rendezvous: Any = None
    attempt = Attempt(planned, 5, rendezvous, StopRequests(), print, survivors=Survivors(tmp_path))
    views: Any = [SimpleNamespace(settled=one) for one in settled]
    assert attempt._invite(views) == invited == survival.invitation(tmp_path, 5).exists()


@pytest.mark.parametrize("forget", [True, False])
def test_nobody_stays_after_an_attempt_without_progress(
    forget: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Supervisor(Job(tmp_path / "run", ResilienceConfig(), ["-m", "program"], processes=2))
    dismissed: list[bool] = []
    left: Any = SimpleNamespace(dismiss=lambda: dismissed.append(True))
    decisions = iter([Decision(Exit.CRASH, "", pause=0.0, forget=forget), Decision(Exit.DONE, "")])
    supervisor.survivors = left
    monkeypatch.setattr(supervisor, "_join", lambda: SimpleNamespace(leave=lambda: None))
    monkeypatch.setattr(supervisor, "_attempt", lambda *arguments: next(decisions))
    monkeypatch.setattr("megatron_anymal.launcher.supervisor.record", lambda *arguments, **more: None)
    supervisor._attempts()
    assert dismissed == ([True] if forget else [])
