"""Tests compute with a single thread, whatever the caller's environment says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import one_thread
import pytest
import torch

# Threads of a process that imports what conftest.py imports first, and of a child that imports nothing but torch.
SCRIPT = """
import json, subprocess, sys
import one_thread, torch
child = subprocess.run([sys.executable, "-c", "import torch; print(torch.get_num_threads())"], capture_output=True)
print(json.dumps([torch.get_num_threads(), int(child.stdout)]))
"""


@pytest.mark.parametrize("threads", [{}, {"OMP_NUM_THREADS": "3"}], ids=["unset", "three"])
def test_the_callers_environment_does_not_matter(threads: dict[str, str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(Path(one_thread.__file__).parent), **threads}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout) == [1, 1], done.stderr


def test_it_holds_here() -> None:
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
