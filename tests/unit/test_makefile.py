"""`make test` and `make test-all` run every test they promise, and fail if one fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(target: str, folder: Path, outcomes: str) -> tuple[int, list[str]]:
    """Make a target with a stand-in for Python, which ends with a part's outcome: a case of a shell's `case`.

    Returns make's exit code and the arguments of each part.
    """
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$*" >> {folder}/calls\ncase "$*" in {outcomes} esac\n')
    python.chmod(0o755)
    (folder / ".installed").touch()
    os.utime(folder / ".installed", (2**32, 2**32))
    done = subprocess.run(["make", target, f"VENV={folder}"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    return done.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1])
def test_one_run_of_all_that_are_not_slow(code: int, tmp_path: Path) -> None:
    made, [call] = make("test", tmp_path, f"*) exit {code};;")
    assert "-m not slow" in call and "--ignore" not in call and "tests/" not in call
    assert (made != 0) == bool(code)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_both_parts_of_all_run_and_report(first: int, second: int, tmp_path: Path) -> None:
    made, calls = make("test-all", tmp_path, f"*--dist*) exit {first};; *) exit {second};;")
    assert len(calls) == 2 and not any("slow" in call for call in calls)
    alone = [word for word in calls[1].split() if word.startswith("tests/")]
    assert "tests/faults/test_launch.py" in alone and "tests/slurm" in alone
    assert all((ROOT / path).exists() for path in alone)
    # The second part runs exactly what the first one leaves out.
    assert [f"--ignore={path}" for path in alone] == [word for word in calls[0].split() if "--ignore" in word]
    assert (made != 0) == bool(first or second)


@pytest.mark.parametrize(
    ("python", "folder"),
    [("python3.11", ".venv"), ("/usr/bin/python3.11", ".venv"), ("python3.12", ".venv-python3.12")],
)
def test_each_python_has_an_environment_of_its_own(python: str, folder: str) -> None:
    command = ["make", "--dry-run", "--always-make", "venv", f"PYTHON={python}"]
    environment = {name: value for name, value in os.environ.items() if name != "VENV"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert f"{python} -m venv {folder}\n" in done.stdout
