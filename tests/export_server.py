"""Run commands that verify exports, without the time that a new interpreter takes to import torch and transformers.

`verify` runs the code of an exported folder with `python -I`, several seconds of imports each time. Here, a fork of a
server that has imported both, and nothing of the trainer, takes its place. Tests of the documentation's commands start
real ones.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fork_server import ONE_THREAD
from ranks import run_ranks

from checkpoint_tools.verifying import comparison


def run_in_rank(command: Callable[[list[str]], int], arguments: Sequence[object]) -> int:
    """Run a command that verifies an export in a process of its own; return its exit code."""
    return int(run_ranks(1, _with_server, _server(), command, [str(word) for word in arguments])[0])


@cache
def _server() -> Path:
    """Start the server of this process; return its socket. It ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="anymal_exports_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    script = Path(__file__).with_name("export_server_process.py")
    words = [sys.executable, "-I", str(script), str(folder / "socket")]
    process = subprocess.Popen(words, env={**os.environ, **ONE_THREAD}, stdin=subprocess.PIPE)
    while not (folder / "socket").exists():
        assert process.poll() is None, "the server of exports has ended, see its output"
        time.sleep(0.05)
    return folder / "socket"


def _with_server(path: Path, command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """In a rank: run the command; the server stands in for the interpreter that the command would start."""

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert words[:2] == [sys.executable, "-I"] and options == {"capture_output": True, "text": True}
        request = {"words": words[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as stream:
            connection.connect(str(path))
            stream.write(json.dumps(request) + "\n")
            stream.flush()
            return subprocess.CompletedProcess(words, *json.loads(stream.read()))

    comparison.subprocess = SimpleNamespace(run=run)  # type: ignore[assignment]
    return command(arguments)
