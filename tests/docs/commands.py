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
    if words[0] == "torchrun":
        return _ranks(command, words, folder)
    if words[:2] == ["anymal", "launch"]:
        module = ["-m", "megatron_anymal", *words[1:]]
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


def _ranks(command: str, words: list[str], folder: Path) -> str:
    """Run `torchrun --nproc-per-node=N ...` without its agent, which other tests use; return what rank 0 printed."""
    world = int(words[1].removeprefix("--nproc-per-node="))
    log = folder / "rank_0.log"
    ranks = fork_server.job(*words[2:], world=world, log=log, cwd=folder)
    try:
        assert [rank.wait(240) for rank in ranks] == [0] * world, f"{command}\n{log.read_text()}"
    finally:
        for rank in ranks:
            rank.process.kill()
    return log.read_text()
