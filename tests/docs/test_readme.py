"""The README stays true: every command in it runs, every path and configuration in it exists."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
from tiny import png

from megatron_anymal.__main__ import main
from megatron_anymal.resilience.exit_codes import Exit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()
]
# Jobs for more processes than a test has: composed, checked and printed instead of run.
CLUSTER = ("--nproc-per-node=8",)


def test_make_targets_exist() -> None:
    targets = [shlex.split(c)[1] for c in COMMANDS if c.startswith("make ")]
    assert targets == ["quickstart", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_install_commands_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "-m venv $(VENV)" in makefile and "python3.11" in makefile
    [torch] = [c.split()[-1] for c in COMMANDS if "pip install torch" in c]
    assert f"TORCH ?= {torch}" in makefile
    assert [c for c in COMMANDS if c.endswith("pip install -e .")]


def anymal(command: str, folder: Path) -> str:
    """Run a README command that starts with anymal, python or torchrun, with this Python; what it printed."""
    words = shlex.split(command.replace(".venv/bin/", ""))
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    log = folder / "printed"
    process = fork_server.start(printing, words, folder, log)
    process.join(240)
    process.kill()
    assert process.exitcode == 0, f"{command}\n{log.read_text()}"
    return log.read_text()


def printing(words: list[str], folder: Path, log: Path) -> None:
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
            # python -m NAME ...
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        finally:
            sys.stdout.flush()


def media_of_the_readme(folder: Path) -> None:
    """The files that the README's manifest names."""
    from tiny import flac, npy

    folder.mkdir()
    manifest = "".join(re.findall(r"```json\n(.*?)```", README, re.DOTALL))
    (folder / "manifest.jsonl").write_text(manifest)
    lines = [json.loads(line) for line in manifest.splitlines()]
    assert {key for line in lines for key in line} == {"key", "parts", "messages", "chosen", "rejected"}
    for name in re.findall(r'"media": "(.*?)"', manifest):
        maker = {"jpg": png, "png": png, "flac": flac, "npy": npy}[name.rpartition(".")[2]]
        (folder / name).write_bytes(maker(1))


@pytest.mark.timeout(600)
def test_commands_run(quickstart_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a reader has it.
    monkeypatch.delenv("OMP_NUM_THREADS")
    shutil.copytree(quickstart_folder, tmp_path / "runs" / "quickstart")
    media_of_the_readme(tmp_path / "media")
    ran = 0
    for command in COMMANDS:
        if command.startswith("make ") or "pip install" in command or "-m venv" in command:
            continue
        if command.startswith("sbatch "):
            # tests/slurm runs the scripts.
            subprocess.run(["bash", "-n", ROOT / command.split()[1]], check=True)
            continue
        if any(mark in command for mark in CLUSTER):
            configuration = command[command.index(" pretrain ") :]
            command = f"anymal{configuration} --print-config"
        # After three steps an answer may be empty: its line is not.
        assert anymal(command, tmp_path), command
        ran += 1
    assert ran >= 9
    three_lines(tmp_path)


def three_lines(folder: Path) -> None:
    """What a HuggingFace user is shown, with the export that a command above made."""
    [code] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "AutoProcessor" in block]
    (folder / "cat.jpg").write_bytes(png(1))
    code = f"from transformers import AutoModelForCausalLM, AutoProcessor\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_exit_codes_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (yes)?", README, re.MULTILINE)
    assert rows == [(str(int(code)), code.meaning, "yes" if code.restarts else "") for code in Exit]


def test_tree_names_what_is_there() -> None:
    tree = README.partition("## Where things are")[2]
    for name in re.findall(r"^      (\w+\.py|\w+/) ", tree, re.MULTILINE):
        assert (ROOT / "megatron_anymal" / name).exists(), name
    for name in re.findall(r"^    (\w+/) ", tree, re.MULTILINE):
        assert (ROOT / name).is_dir(), name
    listed = set(re.findall(r"^      (\w+)\.py ", tree, re.MULTILINE)) | {"__init__"}
    assert listed == {p.stem for p in (ROOT / "megatron_anymal").glob("*.py")}


def test_configurations_exist() -> None:
    shipped = {p.stem for p in (ROOT / "nemo_configs").glob("*.yaml")}
    table = README.partition("| configuration |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`((?:quickstart|pretrain|sft|dpo)\w*)`", table)) == shipped
