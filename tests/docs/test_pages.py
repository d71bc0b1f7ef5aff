"""README and docs stay true: every command in them runs, every configuration, path and exit code in them exists."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import PAGES, ROOT, blocks, commands, run
from tiny import flac, npy, png

from megatron_anymal.resilience.exit_codes import Exit

# Followed word for word by a test of its own.
OWN_DATA = "docs/start/your-own-data.md"
# Their commands are run by tests of their own: with a server, on folders in the layouts of published data sets, and
# with a cache in the test's folder, and with classifiers.
OBJECT_STORAGE, DATA_SETS = "docs/guides/object-storage.md", "docs/guides/data-sets.md"
FEATURE_CACHE, INTEGRITY = "docs/guides/feature-cache.md", "docs/guides/integrity.md"
DATA_GUIDE = PAGES["docs/guides/data.md"]


def of_all_pages() -> list[str]:
    """Commands of all pages, once each and in order; not those that install."""
    elsewhere = (OWN_DATA, OBJECT_STORAGE, DATA_SETS, FEATURE_CACHE, INTEGRITY, "README.md")
    lines = [line for page, text in PAGES.items() if page not in elsewhere for line in commands(text)]
    lines += [line for line in commands(PAGES["README.md"]) if line not in commands(PAGES[OWN_DATA])]
    ours = [x for x in dict.fromkeys(lines) if not x.startswith("make ") and not re.search(r"pip install|-m venv", x)]
    return [line for line in ours if "runs/pretrain_1b_image" not in line]


def media_of_the_guide(folder: Path) -> None:
    """The files that the data guide's manifests name."""
    folder.mkdir()
    manifest = "".join(block for block in blocks(DATA_GUIDE, "json") if '"key"' in block)
    (folder / "manifest.jsonl").write_text(manifest)
    lines = [json.loads(line) for line in manifest.splitlines()]
    assert {key for line in lines for key in line} >= {"key", "parts", "messages", "chosen", "rejected"}
    for name in re.findall(r'"media": "(.*?)"', manifest):
        maker = {"jpg": png, "png": png, "flac": flac, "npy": npy}[name.rpartition(".")[2]]
        (folder / name).write_bytes(maker(1))


@pytest.mark.timeout(900)
def test_commands_run(quickstart_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a reader's shell.
    monkeypatch.delenv("OMP_NUM_THREADS")
    shutil.copytree(quickstart_folder, tmp_path / "runs" / "quickstart")
    media_of_the_guide(tmp_path / "media")
    ran = 0
    for command in of_all_pages():
        if command.startswith("sbatch "):
            # tests/slurm runs the scripts.
            subprocess.run(["bash", "-n", ROOT / command.split()[1]], check=True)
            continue
        if "--nproc-per-node=8" in command:
            # Jobs for more processes than a test has: composed, checked and printed.
            verb = re.search(r" (pretrain|sft|dpo) .*", command)
            assert verb, command
            command = f"anymal {verb[0].strip()} --print-config"
        folder = tmp_path
        if command.startswith("anymal plan --config-name=pretrain_70b_image"):
            # In a folder without its data set: another page has made one of that name, with other media.
            folder = tmp_path / "plan"
            folder.mkdir(exist_ok=True)
        # After three steps an answer may be empty, but its line is not.
        assert run(command, folder), command
        ran += 1
    assert ran >= 20
    with_transformers(tmp_path)


def with_transformers(folder: Path) -> None:
    """What a HuggingFace user is shown, with the export that a command above made."""
    [code] = [x for x in blocks(PAGES["docs/guides/checkpoints-hf.md"], "python") if "AutoProcessor" in x]
    (folder / "cat.jpg").write_bytes(png(1))
    if "import AutoModelForCausalLM" not in code:
        code = f"from transformers import AutoModelForCausalLM, AutoProcessor\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_no_command_hides_in_another_block() -> None:
    """Placeholders stand in text blocks; whatever can be run is in a bash block."""
    for page, text in PAGES.items():
        for line in commands(text):
            assert not re.search(r"\b[A-Z]{3,}\b(?!=)|<\w", re.sub("TORCH|UNLIKELY", "", line)), f"{page}: {line}"
            assert shlex.split(line)


def test_exit_codes_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (yes)?", PAGES["docs/operations/failures.md"], re.MULTILINE)
    assert rows == [(str(int(code)), code.meaning, "yes" if code.restarts else "") for code in Exit]


def test_configurations_exist() -> None:
    shipped = {p.stem for p in (ROOT / "nemo_configs").glob("*.yaml")}
    table = PAGES["docs/guides/pretraining.md"].partition("| configuration |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`((?:quickstart|pretrain|align|sft|dpo|mio)\w*)`", table)) == shipped


def test_paths_exist() -> None:
    """Files of this project that a page names in backticks."""
    roots = ("megatron_anymal", "benchmarks", "docs", "examples", "findings", "nemo_configs", "slurm", "tests")
    for page, text in PAGES.items():
        for name in re.findall(rf"`((?:{'|'.join(roots)})/[\w./-]+\.(?:py|md|json|yaml|sh|svg))`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_tree_names_what_is_there() -> None:
    tree = PAGES["docs/internals/architecture.md"]
    packages = {p.parent.name for p in (ROOT / "megatron_anymal").glob("*/__init__.py")}
    files = {p.stem for p in (ROOT / "megatron_anymal").glob("*.py")} - {"__init__"}
    for name in packages:
        assert f"{name}/" in tree, name
    for name in files:
        assert f"{name}.py" in tree, name
