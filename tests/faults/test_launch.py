"""The launcher with fake ranks that only send heartbeats and fail on request.

Covers restarts, signals, hangs, exit codes and several nodes. Most runs use a plain agent in place of the one in
nvidia-resiliency-ext, because torchrun takes seconds to import.
"""

from __future__ import annotations

import importlib.util
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ports import free_port

from megatron_anymal.config import ResilienceConfig, composed_ahead
from megatron_anymal.launcher import attempt, supervisor
from megatron_anymal.launcher.agent import ranks_below
from megatron_anymal.launcher.job import Job, new_attempt
from megatron_anymal.launcher.rendezvous import SingleNode
from megatron_anymal.launcher.stop_requests import StopRequests
from megatron_anymal.launcher.supervisor import Supervisor
from megatron_anymal.peer_memory import keeper
from megatron_anymal.resilience.events import read
from megatron_anymal.resilience.exit_codes import Exit

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_rank.py")
PLAIN = Path(__file__).with_name("plain_agent")
# Seconds without a heartbeat that count as a hang; long enough for a busy machine.
TIMEOUT = 3.0


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set PYTHONPATH, so that the agent and rank processes import this checkout."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}:{PLAIN}")


def job(run_dir: Path, *arguments: str, processes: int = 2, launcher: str = "ft", timeout: float = TIMEOUT) -> Job:
    """A run of fake ranks. `arguments` are the number of steps and the faults."""
    # A busy machine takes longer to start a Python than to schedule a running one.
    limits = ResilienceConfig(hang_timeout=timeout, startup_timeout=2 * timeout, checkpoint_timeout=20 * timeout)
    return Job(run_dir, limits, [str(FAKE), str(run_dir), *arguments], processes, launcher=launcher, standby=False)


def apart(run_dir: Path, steps: str, begin: str = "", **more: Any) -> subprocess.Popen[bytes]:
    """Start a launcher as a process of its own, and wait until its run has saved a checkpoint."""
    program = (
        f"{begin}import sys; sys.path.insert(0, sys.argv[1]); from test_launch import Path, Supervisor, job;"
        "sys.exit(Supervisor(job(Path(sys.argv[2]), sys.argv[3])).run())"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(FAKE.parent), str(run_dir), steps], **more)
    while not (run_dir / "checkpoints").is_dir():
        assert process.poll() is None
        time.sleep(0.05)
    return process


def told(run_dir: Path, kind: str) -> list[dict]:  # type: ignore[type-arg]
    return [event for event in read(run_dir) if event["kind"] == kind]


def report(run_dir: Path) -> str:
    return (run_dir / "report.md").read_text()


def nothing_left(run_dir: Path) -> bool:
    """Return whether no process of the run is left."""
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline", "status"])]
    # Ranks, agents, and what agents fork.
    parts = ("fake_rank", "megatron_anymal.launcher.agent")
    return not [line for line in lines if str(run_dir) in line and any(part in line for part in parts)]


REAL_AGENT = pytest.param(
    "ft",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("nvidia_resiliency_ext") is None,
        reason="nvidia-resiliency-ext is not installed: pip install -e '.[resiliency]'",
    ),
)


@pytest.mark.parametrize("launcher", ["torchrun", REAL_AGENT])
def test_killed_and_crashed_it_goes_on_by_itself(
    launcher: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the plain agent.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    run = tmp_path / "run"
    faults = ("1:5:kill:1", "0:8:crash:2")
    assert Supervisor(job(run, "12", *faults, launcher=launcher, timeout=60)).run() == Exit.DONE
    assert (run / "checkpoints" / "step_00000012").is_dir() and nothing_left(run)
    [death, ended] = told(run, "death")
    assert (death["rank"], death["signal"], death["step"], death["attempt"]) == (1, signal.SIGKILL, 5, 1)
    assert (ended["rank"], ended["exit_code"], ended["attempt"]) == (0, 1, 2)
    restarts = told(run, "restart")
    assert [event["pause"] for event in restarts] == [0.0, 0.0]
    # The other ranks were terminated within ten seconds of the death.
    assert restarts[0]["time"] - death["time"] < 10
    text = report(run)
    assert "rank 0 was told to crash" in text and "Traceback" in text and "SIGKILL" in text
    assert {p.name for p in (run / "logs" / "attempt_2").iterdir()} == {
        "rank_00000.out",
        "rank_00000.err",
        "rank_00001.out",
        "rank_00001.err",
    }
    # The console shows it too, prefixed with the rank.
    assert "[rank 0] RuntimeError: rank 0 was told to crash" in capfd.readouterr().err


def test_a_crash_in_native_code_leaves_its_stack(tmp_path: Path) -> None:
    assert Supervisor(job(tmp_path, "4", "1:2:abort:1", launcher="torchrun")).run() == Exit.DONE
    [death] = told(tmp_path, "death")
    assert (death["rank"], death["signal"]) == (1, signal.SIGABRT)
    assert "Fatal Python error: Aborted" in death["output"] and "in fail" in death["output"]
    assert death["output"] in report(tmp_path)


def test_memory_that_cannot_be_kept_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(run_dir: Path, files: list[int]) -> None:
        raise keeper.NoKeeper("no room")

    monkeypatch.setattr(keeper, "start", start)
    assert Supervisor(replace(job(tmp_path / "run", "2"), keep_memory=True)).run() == Exit.DONE
    warning = "[launch] warning: the copies in memory will not outlive a launcher that is killed: no room\n"
    assert capsys.readouterr().out.count(warning) == 1


@pytest.mark.parametrize(("module", "way"), [("with_a_thread", "anew"), ("json", "standby")])
def test_where_forks_are_not_safe_ranks_are_started_anew(
    module: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RANK_MODULES", ())
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{ROOT / 'tests' / 'unit' / 'launcher'}")
    run = tmp_path / "run"
    planned = replace(job(run, "6", "1:2:crash:1"), standby=True, preload=(module,))
    assert Supervisor(planned).run() == Exit.DONE and nothing_left(run)
    assert [event["way"] for event in told(run, "start") if "way" in event] == [way] * 2


def test_ranks_take_the_configuration_that_the_launcher_composed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RANK_MODULES", ())
    (tmp_path / "base.yaml").write_text("defaults: [anymal, _self_]\ntrainer: {max_steps: 7}\n")
    run = tmp_path / "run"
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{tmp_path}")
    (tmp_path / "composing.py").write_text(
        "import sys; from pathlib import Path; from megatron_anymal.config import composed_ahead\n"
        "composed = composed_ahead.composed('base', Path(sys.argv[1]), ['trainer.devices=2'])\n"
        "print(composed.config.trainer.max_steps, 'hydra' in sys.modules)\n"
    )
    composed_ahead.compose_ahead("base", tmp_path, ["trainer.devices=2"])
    program = ["-m", "composing", str(tmp_path)]
    planned = replace(job(run, launcher="torchrun"), program=program, processes=1, standby=True)
    assert Supervisor(planned).run() == Exit.DONE
    assert (run / "logs" / "attempt_1" / "rank_00000.out").read_text() == "7 False\n"


def test_each_hang_is_found_in_time_and_blamed_on_its_rank(tmp_path: Path) -> None:
    run = tmp_path / "run"
    faults = ("1:3:saving:1", "0:5:gil:2", "1:7:data:3", "0:9:sleep:4", "1:-1:silent:5")
    assert Supervisor(job(run, "10", *faults)).run() == Exit.DONE
    hangs = told(run, "hang")
    assert [(h["cause"], h["ranks"]) for h in hangs] == [
        ("stopped", [1]),
        ("gil", [0]),
        ("data", [1]),
        ("collective", [0]),
        ("startup", [1]),
    ]
    reached = {(p.name.split("_")[1], p.name.split("_")[2]): p.stat().st_mtime for p in (run / "reached").iterdir()}
    for hang, step in zip(hangs[:4], (2, 4, 6, 8)):
        since = hang["time"] - reached[(str(step), str(hang["attempt"]))]
        assert TIMEOUT <= since < TIMEOUT + 5, hang
        assert TIMEOUT <= hang["silent"] < TIMEOUT + 5, hang
    # A stopped process writes no stacks; a process that holds the GIL does.
    assert set(hangs[0]["stacks"]) == {"0"} and "fail" in hangs[1]["where"]["0"][0]
    assert nothing_left(run) and "holding the GIL" in report(run)


def test_steps_between_two_looks_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than an attempt takes.
    monkeypatch.setattr(attempt, "_LOOK", 4.0)
    run = tmp_path / "run"
    planned = job(run, "9", "0:6:crash", timeout=60)
    ending = attempt.Attempt(planned, new_attempt(run), SingleNode(), StopRequests(), print).run()
    assert (ending.code, ending.step) == (Exit.CRASH, 6)


def test_a_suspended_job_goes_on(tmp_path: Path) -> None:
    # As Slurm suspends jobs: every process, the launcher too, for longer than hang_timeout.
    run = tmp_path / "run"
    process = apart(run, "30")
    all_ = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in all_:
        one.suspend()
    time.sleep(attempt._SUSPENDED + TIMEOUT)
    for one in all_:
        one.resume()
    assert process.wait(240) == Exit.DONE, report(run)
    assert told(run, "hang") == [] and len(told(run, "start")) == 1


def test_a_run_that_does_not_get_on_is_given_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert Supervisor(job(run, "10", "1:-1:words")).run() == Exit.CRASH_LOOP
    assert len(told(run, "start")) == 4 and len(told(run, "crash_loop")) == 1
    # The rank recorded no event, so the report shows its last output.
    assert "the last words of a rank" in report(run) and "79" in report(run)


def test_a_rank_that_ends_before_the_launcher_looks_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that fail before their imports end within a tenth of a second."""
    monkeypatch.setattr(attempt, "_LOOK", 2.0)
    run = tmp_path / "run"
    assert Supervisor(job(run, "10", f"1:-1:code={int(Exit.MISTAKE)}", timeout=30)).run() == Exit.MISTAKE
    assert len(told(run, "start")) == 1 and not told(run, "hang")


@pytest.mark.parametrize("code", [Exit.MISTAKE, pytest.param(Exit.LOCKED, marks=pytest.mark.slow)])
def test_what_starting_again_cannot_help_is_not_started_again(tmp_path: Path, code: Exit) -> None:
    """Only one rank exits with the code; the others are terminated."""
    run = tmp_path / "run"
    assert Supervisor(job(run, "100", f"1:3:code={int(code)}")).run() == code
    assert len(told(run, "start")) == 1 and not told(run, "restart") and nothing_left(run)
    # The folder of another job is not touched.
    assert (run / "report.md").exists() is (code is not Exit.LOCKED)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_a_signal_is_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"

    def send() -> None:
        while not (run / "checkpoints").is_dir():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    asked = Job(**{**vars(job(run, "10000")), "grace_seconds": 30.0})
    assert Supervisor(asked).run() == Exit.REQUEUE
    stopped = told(run, "stopped")
    assert {event["rank"] for event in stopped} >= {0} and nothing_left(run)
    assert f"signal {int(number)}, grace 30" in {event["text"] for event in stopped}
    assert len(told(run, "start")) == 1 and "75" in report(run)


@pytest.mark.parametrize("nohup", [False, True])
def test_the_loss_of_the_terminal_stops_with_a_checkpoint(tmp_path: Path, nohup: bool) -> None:
    run = tmp_path / "run"
    leader, terminal = pty.openpty()
    # As nohup, or else as an interactive shell, leaves it.
    handler = signal.SIG_IGN if nohup else signal.SIG_DFL
    begin = f"import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); signal.signal(1, {int(handler)});"
    steps = "20" if nohup else "10000"
    process = apart(run, steps, begin, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    os.close(leader)
    assert process.wait(240) == (Exit.DONE if nohup else Exit.REQUEUE) and nothing_left(run)
    assert bool(told(run, "stopped")) is not nohup and f"{process.returncode}" in report(run)


@pytest.mark.slow
def test_a_launcher_that_is_killed_takes_its_ranks_along(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = apart(run, "10000")
    [agent] = psutil.Process(process.pid).children()
    ranks = ranks_below(agent.pid)
    assert sorted(ranks) == [0, 1]
    process.kill()
    process.wait()
    # Left alone, the ranks would go on for 1,000 s.
    deadline = time.monotonic() + 120
    while any(psutil.pid_exists(pid) for pid in [*ranks.values(), agent.pid]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


NODE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from typing import Any
from test_launch import Job, Supervisor, job
_, _, node, port, patience, run, *rest = sys.argv
more = dict(nodes=2, node=int(node), endpoint=f"127.0.0.1:{port}", local_addr="127.0.0.1", rdzv_timeout=float(patience))
sys.exit(Supervisor(Job(**{**vars(job(Path(run), *rest, processes=1, launcher="torchrun")), **more})).run())
"""


def start_node(node: int, port: int, patience: float, run: Path, *rest: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", NODE, str(FAKE.parent), str(node), str(port), str(patience), str(run), *rest]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_nodes_start_again_together(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    nodes = [start_node(node, port, 100, run, "8", "1:3:kill:1", "0:5:stop:2") for node in (0, 1)]
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [Exit.DONE, Exit.DONE], "\n".join(outputs)
    assert [event["attempt"] for event in told(run, "start")] == [1, 2, 3]
    assert [(e["rank"], e["signal"]) for e in told(run, "death") if "signal" in e] == [(1, 9)]
    # Each node only sees its own ranks. The other node's rank waits in a collective and may be blamed as well, but the
    # report puts the certain cause first.
    blamed = {(e["cause"], *e["ranks"]) for e in told(run, "hang")}
    assert {("stopped", 0)} <= blamed <= {("stopped", 0), ("collective", 1), ("collective",)}, blamed
    assert "Attempt 2: rank 0, step 5, hang (stopped)" in report(run)


@pytest.mark.slow
def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    node = start_node(0, free_port(), 2, tmp_path / "run", "8")
    output = node.communicate(timeout=240)[0]
    assert node.returncode == Exit.CRASH and "node 1 of 2 did not join within 2 s" in output
    node = start_node(1, free_port(), 2, tmp_path / "run", "8")
    output = node.communicate(timeout=240)[0]
    assert node.returncode == Exit.CRASH and "node 0's launcher cannot be reached" in output
