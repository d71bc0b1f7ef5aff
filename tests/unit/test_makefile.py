"""`make test` runs both of its parts even if the first one fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["test", "test-all"])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_both_parts_run_and_report(target: str, first: int, second: int, tmp_path: Path) -> None:
    """A stand-in for Python records its arguments and fails in the requested parts."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncase "$*" in *--dist*) exit {first};; *) exit {second};; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    os.utime(tmp_path / ".installed", (2**32, 2**32))
    done = subprocess.run(["make", target, f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    alone = [word for word in calls[1].split() if word.startswith("tests/")]
    assert "tests/faults/test_launch.py" in alone and "tests/slurm" in alone
    assert all((ROOT / path).exists() for path in alone)
    # The second part runs exactly what the first one leaves out.
    assert [f"--ignore={path}" for path in alone] == [word for word in calls[0].split() if "--ignore" in word]
    assert all(("-m not slow" in call) == (target == "test") for call in calls)
    assert (done.returncode != 0) == bool(first or second)
