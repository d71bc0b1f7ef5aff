"""tests/te/install.sh: what it installs, builds and refuses, with a stand-in for the environment's Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("install.sh")
# Answers with the versions of a torch, and notes each call of pip.
PYTHON = f"""#!{sys.executable}
import json, os, sys
folder = os.path.dirname(os.path.abspath(__file__))
if sys.argv[1] == "-c":
    for word, answer in (("cuda", os.environ["CUDA_OF_TORCH"]), ("cp", "cp312"), ("purelib", folder + "/site")):
        if word in sys.argv[2]:
            print(answer)
            break
else:
    call = {{"words": sys.argv[3:], **{{name: os.environ.get(name, "") for name in ("CUDA_HOME", "CPATH", "PATH")}}}}
    with open(folder + "/calls", "a") as calls:
        calls.write(json.dumps(call) + "\\n")
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def install(python: Path, *folder: str, cuda: str = "13.0", **variables: str) -> tuple[str, list[dict[str, str]]]:
    """Run the script; return what it refused, and the calls of pip."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CPATH", "CXX")}
    environment |= {"CUDA_OF_TORCH": cuda, "CXX": "true", **variables}
    done = subprocess.run([SCRIPT, python, *folder], env=environment, capture_output=True, text=True)
    assert done.returncode == (1 if done.stderr else 0)
    calls = python.with_name("calls")
    return done.stderr, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.mark.parametrize(
    ("settings", "expected_message"),
    [
        ({"cuda": ""}, "torch here is a CPU build"),
        ({"CXX": "no-such-compiler"}, "there is no C++ compiler ('no-such-compiler')"),
        ({"cuda": "12.8"}, "torch here is built for CUDA 12.8"),
    ],
)
def test_what_it_cannot_build_for_is_refused_with_the_reason(
    python: Path, settings: dict[str, str], expected_message: str
) -> None:
    refusal, calls = install(python, **settings)
    assert refusal.startswith("Transformer Engine is not installed: ") and expected_message in refusal and not calls


def test_without_a_toolkit_the_headers_are_those_of_pypi(python: Path) -> None:
    refusal, [headers, ninja, build, last] = install(python)
    assert not refusal and ninja["words"][-1] == "ninja"
    assert headers["words"][-1].startswith("cuda-toolkit[") and not headers["CUDA_HOME"]
    site = python.parent / "site" / "nvidia"
    assert build["words"][0] == "wheel" and build["words"][-1].startswith("transformer_engine_torch")
    assert build["CUDA_HOME"] == f"{site}/cu13" and build["CPATH"] == f"{site}/cudnn/include:{site}/nccl/include"
    # Programs of the environment, such as ninja, are found.
    assert build["PATH"].startswith(f"{python.parent}:")
    assert last["words"][:1] == ["install"] and last["words"][-1] == ".[te]"


def test_a_toolkit_is_used_if_it_is_named(python: Path) -> None:
    _, calls = install(python, cuda="12.8", CUDA_HOME="/a/toolkit", CPATH="/more")
    assert not any("cuda-toolkit" in call["words"][-1] for call in calls)
    assert calls[-2]["CUDA_HOME"] == "/a/toolkit" and calls[-2]["CPATH"].endswith("/nccl/include:/more")


def test_a_wheel_for_this_python_is_taken_from_the_folder(python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "transformer_engine_torch-2.11.0-cp311-cp311-linux_x86_64.whl").touch()
    _, calls = install(python, str(folder))
    assert f"--wheel-dir={folder}" in calls[-2]["words"]
    (folder / "transformer_engine_torch-2.11.0-cp312-cp312-linux_x86_64.whl").touch()
    python.with_name("calls").unlink()
    # Without a compiler, too.
    _, [only] = install(python, str(folder), CXX="no-such-compiler")
    assert f"--find-links={folder}" in only["words"] and only["words"][-1] == ".[te]"


def test_shellcheck_finds_nothing() -> None:
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
