"""What a launcher prints."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_anymal.config import ResilienceConfig
from megatron_anymal.launcher.console import announce
from megatron_anymal.launcher.job import Job

ROOT = Path(__file__).parents[3]
LOST = """
import os, sys
from pathlib import Path
from megatron_anymal.config import ResilienceConfig
from megatron_anymal.launcher.console import announce
from megatron_anymal.launcher.job import Job
leader, terminal = os.openpty()
sys.stdout = open(terminal, "w")
os.close(leader)
job = Job(Path("run"), ResilienceConfig(), [], 1)
announce(job, "nobody reads this")
announce(job, "nor this")
"""


@pytest.mark.parametrize(
    ("given", "line"),
    [({}, "[launch] x\n"), ({"nodes": 3, "node": 2}, "[launch node 2] x\n"), ({"spare": True}, "[launch spare] x\n")],
)
def test_the_node_is_named(given: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    announce(replace(Job(Path("run"), ResilienceConfig(), [], 1), **given), "x")
    assert capsys.readouterr().out == line


def test_a_lost_terminal_ends_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, b"")
