"""The commands of README and docs, and a way to run one as a reader would."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import fork_server

from megatron_anymal.__main__ import main

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
    log = folder / "printed"
    process = fork_server.start(_printing, words, folder, log)
    process.join(240)
    process.kill()
    assert process.exitcode == 0, f"{command}\n{log.read_text()}"
    return log.read_text()


def _printing(words: list[str], folder: Path, log: Path) -> None:
    """In a process of its own: ends with a command's exit code; what it prints goes to `log`."""
    os.chdir(folder)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        try:
            if words[0] == "anymal":
                sys.argv = words
                sys.exit(main(words[1:]))
            # python -m NAME ... or python -c CODE
            if words[1] == "-c":
                exec(words[2], {"__name__": "__main__"})
            else:
                sys.argv = words[2:]
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        finally:
            sys.stdout.flush()
