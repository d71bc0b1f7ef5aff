"""Memory of a launcher that was killed is there for the next launcher of the run, for a while, and for nobody else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_anymal.peer_memory import keeper
from megatron_anymal.peer_memory.server import MEMORY, MemoryServer
from megatron_anymal.peer_memory.slots import SlotFile

# A launcher that leaves a copy of step 5 in the memory of its rank 1, then waits for a line of input.
LAUNCHER = """
import json, sys
from pathlib import Path
from megatron_anymal.peer_memory.server import MEMORY, MemoryServer
from megatron_anymal.peer_memory.slots import Copy, SlotFile
server = MemoryServer(2, kept_for=Path(sys.argv[1]))
file = SlotFile(json.loads(server.environment()[MEMORY])["files"][1], 50)
slot = file.begin()
file.data(slot)[:] = b"x" * 50
file.commit(slot, Copy(1, 5, "run", 50, 0))
print("ready", flush=True)
if sys.stdin.readline():
    server.close()
"""


Keepers = Callable[[], list[psutil.Process]]


@pytest.fixture
def keepers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keepers]:
    """Lists the keepers that this test has started, and kills those it leaves; other tests run at the same time."""
    monkeypatch.setenv("KEEPERS_OF_TEST", str(tmp_path))

    def started() -> list[psutil.Process]:
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get("KEEPERS_OF_TEST") == str(tmp_path)
                if ours and keeper.__name__ in process.cmdline():
                    processes.append(process)
        return processes

    yield started
    for process in started():
        process.kill()


def wait_for_no_keeper(keepers: Keepers) -> None:
    # Less than the minute that the keeper of a killed launcher stays.
    deadline = time.monotonic() + 40
    while keepers():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def launcher(run: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def kill_tree(process: subprocess.Popen[str]) -> None:
    below = psutil.Process(process.pid).children(recursive=True)
    for victim in [psutil.Process(process.pid), *below]:
        with suppress(psutil.Error):
            victim.kill()
    process.wait()


def steps(server: MemoryServer) -> list[dict[int, int]]:
    files = json.loads(server.environment()[MEMORY])["files"]
    return [{copy.rank: copy.step for copy in SlotFile(path).copies().values()} for path in files]


def test_the_next_launcher_has_the_copies(tmp_path: Path, keepers: Keepers) -> None:
    run = tmp_path / "run"
    kill_tree(launcher(run))
    second = MemoryServer(2, kept_for=run)
    assert steps(second) == [{}, {1: 5}]
    file = SlotFile(json.loads(second.environment()[MEMORY])["files"][1])
    assert bytes(file.data(0)) == b"x" * 50
    second.close()
    # The second one was not killed.
    wait_for_no_keeper(keepers)
    third = MemoryServer(2, kept_for=run)
    assert steps(third) == [{}, {}]
    third.close()


def test_two_in_a_row_are_killed(tmp_path: Path, keepers: Keepers) -> None:
    kill_tree(launcher(tmp_path))
    code = (
        "import sys, os; from pathlib import Path; from megatron_anymal.peer_memory.server import MemoryServer\n"
        "server = MemoryServer(2, kept_for=Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=240)
    assert done.returncode == -signal.SIGKILL
    third = MemoryServer(2, kept_for=tmp_path)
    assert steps(third) == [{}, {1: 5}]
    third.close()


def test_a_launcher_that_ends_takes_the_memory_along(tmp_path: Path, keepers: Keepers) -> None:
    process = launcher(tmp_path)
    assert len(keepers()) == 1
    process.communicate("end\n", timeout=240)
    assert process.returncode == 0
    wait_for_no_keeper(keepers)


def test_a_running_launcher_keeps_its_memory(tmp_path: Path, keepers: Keepers) -> None:
    process = launcher(tmp_path)
    assert keeper.adopt(tmp_path, 2) is None
    process.communicate("end\n", timeout=240)
    wait_for_no_keeper(keepers)


def test_another_number_of_processes_begins_anew(tmp_path: Path, keepers: Keepers) -> None:
    kill_tree(launcher(tmp_path))
    second = MemoryServer(3, kept_for=tmp_path)
    assert steps(second) == [{}, {}, {}]
    second.close()
    wait_for_no_keeper(keepers)


def test_a_run_folder_made_anew_begins_anew(tmp_path: Path, keepers: Keepers) -> None:
    run = tmp_path / "run"
    kill_tree(launcher(run))
    shutil.rmtree(run)
    second = MemoryServer(2, kept_for=run)
    assert steps(second) == [{}, {}]
    second.close()


def test_the_memory_is_freed_if_nobody_comes() -> None:
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    file = os.memfd_create("anymal_test")
    code = (
        "import sys; from megatron_anymal.peer_memory import keeper\n"
        "keeper.LINGER = 0.5; sys.exit(keeper.main(sys.argv[1:]))"
    )
    passed = [its.fileno(), file]
    words = [sys.executable, "-c", code, *map(str, passed)]
    subprocess.run(words, input=b"a key", pass_fds=passed, check=True, timeout=240)
    its.close()
    os.close(file)
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    time.sleep(1.0)
    # The launcher lives.
    probe.connect(keeper._address("a key"))
    probe.close()
    mine.close()
    deadline = time.monotonic() + 240
    with pytest.raises(ConnectionRefusedError):
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                time.sleep(0.8)
                probe.connect(keeper._address("a key"))


def test_the_key_is_only_the_users(tmp_path: Path, keepers: Keepers) -> None:
    server = MemoryServer(1, kept_for=tmp_path)
    assert (tmp_path / keeper.KEY).stat().st_mode & 0o777 == 0o600
    [process] = keepers()
    assert (tmp_path / keeper.KEY).read_text() not in " ".join(process.cmdline())
    server.close()


def test_without_a_keeper_memory_works_and_the_reason_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(folder: Path, ranks: int = 1) -> str:
        server = MemoryServer(ranks, kept_for=folder)
        assert steps(server) == [{}] * ranks
        server.close()
        return server.not_kept

    assert reason(tmp_path) == ""
    (tmp_path / "run").write_text("no folder")
    assert "File exists" in reason(tmp_path / "run") and str(tmp_path / "run") in reason(tmp_path / "run")
    assert "128 ranks on a node, not of 129" in reason(tmp_path, 129)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert reason(tmp_path) == "its process did not start"
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "/nowhere/python" in reason(tmp_path)
