"""Help and refusals come before anything slow is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Each takes from half a second to several seconds to import.
SLOW = ("torch", "transformers", "megatron.core", "lightning", "nemo", "scipy", "pandas", "webdataset", "av")
# Runs `python -m MODULE WORDS...`, then tells the exit code and which slow modules were imported.
CODE = f"""
import json, runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
code = 0
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    code = ended.code
finally:
    print("FOUND" + json.dumps([code, [name for name in {SLOW + ("numpy",)} if name in sys.modules]]), flush=True)
"""
VERBS = ("pretrain", "sft", "dpo", "launch", "generate", "evaluate", "prepare", "inspect", "plan", "doctor")
TOOLS = ("export_hf", "import_hf", "verify", "reshard", "inspect")
HELP = [
    ["megatron_anymal", "--help"],
    *(["megatron_anymal", verb, "--help"] for verb in VERBS),
    *([f"checkpoint_tools.{tool}", "--help"] for tool in TOOLS),
    ["examples.tiny_models", "--help"],
]
# Command line -> a word of the refusal.
REFUSED = {
    "pretrain --config-name=nothing": "nothing.yaml",
    "pretrain --config-name=pretrain_8b_image trainer.max_stesp=3": "max_steps",
    "pretrain --config-name=pretrain_8b_image trainer.max_steps=many": "trainer.max_steps",
    "sft --config-name=pretrain_8b_image": "pretrain",
    "launch pretrian": "pretrain",
    "launch pretrain --config-name=nothing": "nothing.yaml",
    "generate --checkpoint=/nowhere --text=hi": "/nowhere",
    "generate --checkpoint=/nowhere --text=hi --media=/none.png": "/none.png",
    "generate --checkpoint=/nowhere --text=hi --top-p=2": "top_p",
    "generate --checkpoint=EXPORT --media=EXPORT/walk.npy": "no modality of this run",
    "generate --checkpoint=EXPORT --media=EXPORT/walk.npy --modality=imu": "no modality 'imu'",
    "evaluate --checkpoint=/nowhere --data=/none": "/none",
    "prepare --manifest=/none.jsonl --out=/tmp/never --tokenizer=/nowhere": "/none.jsonl",
    "prepare --index-only=/none --tokenizer=/nowhere": "/none",
    "prepare --index-only=/none --tokenizer=/nowhere --limit=max_pixel=3": "max_pixels",
    "inspect /none --tokenizer=/nowhere": "/none",
    "plan goodput --gpus=0": "gpus",
}


def run(*words: str) -> tuple[int, list[str], str]:
    """Exit code of a command, the slow modules that it imported, and its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    code, imported = json.loads(done.stdout.split("FOUND")[1])
    return code, imported, done.stderr


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_imports_nothing_slow(words: list[str]) -> None:
    code, imported, said = run(*words)
    assert (code, imported) == (0, []), said


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of an exported model with images only, and a recording."""
    folder = tmp_path_factory.mktemp("export")
    settings = {"model_type": "anymal", "modalities": {"image": {"kind": "image"}}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "walk.npy").write_bytes(b"")
    return folder


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_imports_nothing_slow(line: str, export: Path) -> None:
    code, said = refusal(line.replace("EXPORT", str(export)).split())
    assert code == 2 and REFUSED[line] in said and said.count("\n") == 1, said


def refusal(words: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a verb in a process that cannot import what is slow."""
    block = f"import sys\nfor name in {SLOW}:\n    sys.modules[name] = None\n"
    code = f"{block}from megatron_anymal.__main__ import command\nsys.argv[0] = 'anymal'\ncommand()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr
