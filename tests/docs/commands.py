"""The commands of README and docs, and a way to run one as a reader would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fork_server

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language, those in lists and admonitions too."""
    return re.findall(rf"^ *```{language}\b[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Command lines of a page's bash blocks."""
    return [line.strip() for block in blocks(text, "bash") for line in block.splitlines() if line.strip()]


def run(command: str, folder: Path) -> str:
    """Run a command that starts with anymal, python or torchrun, with this Python; return what it printed."""
    words = shlex.split(command.replace(".venv/bin/", ""))
    if words[0] == "torchrun" or words[:2] == ["anymal", "launch"]:
        module = ["-m", "megatron_anymal", *words[1:]]
        if words[0] == "torchrun":
            module = ["-m", "torch.distributed.run", "--standalone", *words[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *module], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    arguments = ["-m", "megatron_anymal", *words[1:]] if words[0] == "anymal" else words[1:]
    done = fork_server.python(*arguments, cwd=folder)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stderr + done.stdout
