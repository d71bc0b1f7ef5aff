"""Tests compute with a single thread, whatever the caller's environment says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, subprocess, sys, torch

def test_threads():
    assert torch.get_num_threads() == 1
    printed = "import torch; print(torch.get_num_threads())"
    assert subprocess.run([sys.executable, "-c", printed], capture_output=True, text=True).stdout == "1\\n"
"""


def test_the_callers_environment_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "test_inside.py").write_text(SCRIPT)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, tmp_path]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    for threads in ({}, {"OMP_NUM_THREADS": "3"}):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {"PYTHONPATH": path, **threads}
        done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
