"""The standby process: what it forks is like a process that was started, ends with it, and is declined where unsafe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_anymal.launcher.standby import Forked, Standby, fork

HERE = Path(__file__).parent
TARGET = "standby_target"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def standby() -> Iterator[Standby]:
    """A standby process that has imported little."""
    process = Standby(environment(), ["json", "numpy", "a_module_that_is_not_there"], print)
    assert process.wait(lambda: None, 60.0)
    yield process
    process.close()


def start(standby: Standby, folder: Path, *arguments: str, more: dict[str, str] | None = None) -> Forked:
    out, err = (folder / "out").open("w"), (folder / "err").open("w")
    with out, err:
        output = [out.fileno(), err.fileno()]
        forked = fork(str(standby.socket), TARGET, arguments, {**environment(), **(more or {})}, folder, output)
    assert forked is not None
    return forked


def told(text: str) -> dict[str, Any]:
    return json.loads(text.split("FOUND")[1])


def test_a_forked_process_finds_what_a_started_one_finds(standby: Standby, tmp_path: Path) -> None:
    more = {"RANK": "3", "A_NEW_ONE": "x"}
    forked = start(standby, tmp_path, "tell", "two words", more=more)
    assert forked.wait(240) == 0 and (tmp_path / f"exit_{forked.pid}").read_text() == "0"
    mine = told((tmp_path / "out").read_text())
    assert (tmp_path / "err").read_text() == "some words\n"
    command = [sys.executable, "-u", "-m", TARGET, "tell", "two words"]
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True, "text": True, "timeout": 240}
    done = subprocess.run(command, env={**environment(), **more}, capture_output=True, **settings)
    theirs = told(done.stdout)
    drawn = [(report.pop("random"), report.pop("numpy")) for report in (mine, theirs)]
    assert mine == theirs
    again = start(standby, tmp_path, "tell")
    again.wait(240)
    other = told((tmp_path / "out").read_text())
    # No two processes draw the same numbers.
    assert len({*drawn[0], *drawn[1], other["random"], other["numpy"]}) == 6


def test_signals_that_the_launcher_ignores_stay_ignored(tmp_path: Path) -> None:
    """As after `nohup`, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        standby = Standby(environment(), [], print)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert standby.wait(lambda: None, 60.0)
        forked = start(standby, tmp_path, "tell")
        assert forked.wait(240) == 0
        assert told((tmp_path / "out").read_text())["handlers"]["SIGINT"] == str(signal.SIG_IGN)
    finally:
        standby.close()


@pytest.mark.parametrize(("arguments", "code"), [(["exit", "0"], 0), (["exit", "75"], 75), (["fail"], 1)])
def test_exit_codes(arguments: list[str], code: int, standby: Standby, tmp_path: Path) -> None:
    forked = start(standby, tmp_path, *arguments)
    assert forked.wait(240) == code == forked.poll()
    assert ("ValueError: on purpose" in (tmp_path / "err").read_text()) == (arguments == ["fail"])


def test_signals_and_waits(standby: Standby, tmp_path: Path) -> None:
    forked = start(standby, tmp_path, "wait")
    assert forked.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0.2)
    forked.send_signal(signal.SIGTERM)
    assert forked.wait(240) == -signal.SIGTERM
    forked.kill()
    assert not psutil.pid_exists(forked.pid)


def test_what_it_forked_ends_with_it(tmp_path: Path) -> None:
    standby = Standby(environment(), [], print)
    assert standby.wait(lambda: None, 60.0)
    forked = start(standby, tmp_path, "wait")
    assert standby._process is not None
    standby._process.kill()
    assert forked.wait(240) == -signal.SIGKILL
    assert fork(str(standby.socket), TARGET, [], environment(), tmp_path, [1, 2]) is None
    # The next attempt gets another one.
    standby.begin()
    assert standby.wait(lambda: None, 60.0)
    assert start(standby, tmp_path, "exit", "4").wait(240) == 4
    standby.close()
    assert not standby.socket.exists()


def test_it_ends_with_its_launcher(tmp_path: Path) -> None:
    code = (
        "import os, time\nfrom megatron_anymal.launcher.standby import Standby\n"
        "standby = Standby(os.environ, [], print)\nassert standby.wait(lambda: None, 60.0)\n"
        "print(standby._process.pid, flush=True)\ntime.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 240
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid)


def test_with_a_second_thread_there_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    messages: list[str] = []
    standby = Standby(environment(), ["with_a_thread"], messages.append)
    try:
        for _ in range(2):
            assert not standby.wait(lambda: None, 60.0)
            # It would be the same again, so the next attempt does not wait for another one.
            standby.begin()
        assert capfd.readouterr().err == "no standby process: it has 2 threads. The ranks are started anew.\n"
        assert messages == []
    finally:
        standby.close()


def test_with_a_thread_since_it_declines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    standby = Standby(environment(), ["with_a_late_thread"], print)
    try:
        assert standby.wait(lambda: None, 60.0)
        time.sleep(1.0)
        assert fork(str(standby.socket), TARGET, ["exit", "0"], environment(), tmp_path, [1, 2]) is None
        assert "the standby process declined to fork: it has 2 threads" in capfd.readouterr().err
        standby.give_up()
        standby.begin()
        assert not standby.wait(lambda: None, 60.0)
    finally:
        standby.close()


def test_one_that_fails_is_reported(tmp_path: Path) -> None:
    messages: list[str] = []
    standby = Standby({**environment(), "PYTHONHOME": str(tmp_path)}, [], messages.append)
    assert not standby.wait(lambda: None, 60.0)
    assert messages == ["the standby process ended with exit code 1: starting the ranks anew"]
    standby.close()
