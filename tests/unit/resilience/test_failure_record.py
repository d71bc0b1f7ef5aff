"""How a process ends: threads and exit handlers as in Python, but without the teardown of the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import atexit, concurrent.futures, sys, threading, time
from megatron_anymal.resilience.failure_record import exit_after_cleanup


class Module:
    def __del__(self):
        print("torn down", flush=True)


def slowly(text):
    time.sleep(0.3)
    # In one write: print adds the line break by a second one.
    sys.stdout.write(text + "\\n")


alive = Module()
threading.Thread(target=slowly, args=("thread",)).start()
concurrent.futures.ThreadPoolExecutor(1).submit(slowly, "executor")
atexit.register(print, "handler")
print("unflushed")
left_open = open("left_open", "w")
left_open.write("text")
CODE
"""


@pytest.mark.parametrize(
    ("code", "torn_down"), [("exit_after_cleanup(3)", False), ("sys.exit(3)", True)], ids=["here", "Python"]
)
def test_threads_handlers_and_output(tmp_path: Path, code: str, torn_down: bool) -> None:
    words = [sys.executable, "-c", SCRIPT.replace("CODE", code)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert done.returncode == 3 and done.stderr == ""
    assert ("torn down" in done.stdout) == torn_down
    lines = done.stdout.replace("torn down", "").split()
    assert sorted(lines[:-1]) == ["executor", "thread", "unflushed"]
    assert lines[-1] == "handler"
    assert (tmp_path / "left_open").read_text() == "text"
