"""Help and refusals come before anything slow is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_shards

ROOT = Path(__file__).parents[3]
# Each takes from half a second to several seconds to import.
SLOW = ("torch", "transformers", "megatron.core", "lightning", "nemo", "scipy", "pandas", "webdataset", "av")
# Runs `python -m MODULE WORDS...`, then prints the exit code and which slow modules were imported.
CODE = f"""
import atexit, json, runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
atexit.register(lambda: print("FOUND" + json.dumps([name for name in {SLOW + ("numpy",)} if name in sys.modules])))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
VERBS = (
    "pretrain",
    "sft",
    "dpo",
    "launch",
    "generate",
    "evaluate",
    "compare",
    "serve",
    "synthesize",
    "prepare",
    "inspect",
    "plan",
    "encode",
    "doctor",
)
TOOLS = ("export_hf", "import_hf", "verify", "reshard", "inspect")
HELP = [
    ["megatron_anymal", "--help"],
    *(["megatron_anymal", verb, "--help"] for verb in VERBS),
    *([f"checkpoint_tools.{tool}", "--help"] for tool in TOOLS),
    ["examples.benchmark_from_folder", "--help"],
    ["examples.tiny_models", "--help"],
    ["examples.quickstart", "--help"],
    ["megatron_anymal.launcher.preflight.command", "--help"],
]
# Command line -> a word of the refusal.
REFUSED = {
    "pretrain --config-name=nothing": "nothing.yaml",
    "pretrain --config-name=pretrain_8b_image trainer.max_stesp=3": "max_steps",
    "pretrain --config-name=pretrain_8b_image trainer.max_steps=many": "trainer.max_steps",
    "sft --config-name=pretrain_8b_image": "pretrain",
    "pretrain --config-name=align_all_8b model.lora.r=8": "model.lora.r=8: all alignments",
    "plan --config-name=align_all_8b --gpus=64 --gpu=h100-80gb": "does not support alignments",
    "inspect --config-name=align_all_8b --html=/tmp/never.html": "the run has several (model.multiplex)",
    "launch pretrian": "pretrain",
    "launch pretrain --config-name=nothing": "nothing.yaml",
    "generate --checkpoint=/nowhere --text=hi": "/nowhere",
    "generate --checkpoint=/nowhere --text=hi --media=/none.png": "/none.png",
    "generate --checkpoint=/nowhere --text=hi --top-p=2": "top_p",
    "generate --checkpoint=EXPORT --media=EXPORT/walk.npy": "no modality of this run",
    "generate --checkpoint=EXPORT --media=EXPORT/walk.npy --modality=imu": "no modality 'imu'",
    "generate --checkpoint=/nowhere --text=hi --integrity=/none.yaml": "/none.yaml",
    "generate --checkpoint=/nowhere --text=hi --integrity=EXPORT/integrity.yaml": "Did you mean 'threshold'",
    "generate --checkpoint=EXPORT --text=hi --modalities=picture": "'picture' is not in the model.discrete",
    "generate --checkpoint=EXPORT --text=hi --code-sampling=picture:top_p=2": "top_p=2.0 must be",
    "generate --checkpoint=EXPORT --text=hi --media-out=/tmp/never": "--media-out has no effect",
    "evaluate --checkpoint=/nowhere --task=vqav2=/none --out=/tmp/never --modalities=text": "--modalities",
    "evaluate --checkpoint=/nowhere --data=/none --integrity=/none.yaml": "/none.yaml",
    "evaluate --checkpoint=/nowhere --data=/none": "/none",
    "evaluate --checkpoint=/nowhere --task=vqa2=/none --out=/tmp/never": "vqav2",
    "evaluate --checkpoint=/nowhere --task=vqav2 --out=/tmp/never": "--data-root",
    "evaluate --checkpoint=/nowhere --task=coco_captions=/none --out=/tmp/never": "/nowhere",
    "serve /nowhere": "/nowhere",
    "serve EXPORT --max-batch=0": "--max-batch",
    "serve EXPORT --integrity=/none.yaml": "/none.yaml",
    "serve EXPORT --shutdown-seconds=-1": "--shutdown-seconds",
    "compare a.jsonl b.jsonl --prompts=/none.jsonl --out=/tmp/never": "/none.jsonl",
    "compare a.jsonl a.jsonl --prompts=EXPORT/prompts.jsonl --out=/tmp/never": "both 'a.jsonl'",
    "compare /nowhere b.jsonl --prompts=EXPORT/prompts.jsonl --out=/tmp/never": "/nowhere",
    "compare a.jsonl /none.jsonl --prompts=EXPORT/prompts.jsonl --out=/tmp/never": "a.jsonl",
    "synthesize --manifest=/none.jsonl --server=http://h --model=m --task=detail --out=/tmp/never.jsonl": "/none.jsonl",
    "synthesize --manifest=/none.jsonl --server=h --model=m --task=detail --out=/tmp/never.jsonl": "--server",
    "synthesize --manifest=/none.jsonl --server=http://h --model=m --task=detial --out=/tmp/never.jsonl": "detail",
    "synthesize --manifest=/none.jsonl": "--server is missing",
    "prepare --manifest=/none.jsonl --out=/tmp/never --tokenizer=/nowhere": "/none.jsonl",
    "prepare --index-only=/none --tokenizer=/nowhere": "/none",
    "prepare --index-only=/none --tokenizer=/nowhere --limit=max_pixel=3": "max_pixels",
    "prepare --from llava /none.json --out=/tmp/never --tokenizer=/nowhere": "/none.json",
    "prepare --from lava /none.json --out=/tmp/never --tokenizer=/nowhere": "llava",
    "prepare --from coco EXPORT/config.json --out=/tmp/never --tokenizer=/nowhere": "captions_",
    "prepare --from llava /none.json --out=/tmp/never --tokenizer=/nowhere --part=1/2": "/none.json",
    "prepare --index-only=/none --tokenizer=/none --part=65/64": "from 1 to 64",
    "prepare --manifest=/none.jsonl --out=/tmp/never --tokenizer=/nowhere --rebuild": "--rebuild",
    "prepare --index-only=/none --tokenizer=/nowhere --filter=min_sied=3": "min_sied",
    "prepare --index-only=/none --tokenizer=/nowhere --filter=integrity=/none.yaml": "/none.yaml",
    "inspect /none --tokenizer=/nowhere": "/none",
    "plan goodput --gpus=0": "gpus",
    "plan --config-name=sft_70b --gpus=64 --gpu=h100": "h100-80gb",
    "plan --config-name=sft_70b --gpus=63 --gpu=h100-80gb": "--nodes-of",
    "plan --config-name=sft_70b --gpus=64 --gpu=h100-80gb --data=/none": "anymal prepare",
    "encode --config-name=nothing": "nothing.yaml",
    "encode --config-name=sft_8b": "data.feature_cache.gib",
    "encode --config-name=sft_8b --processes=0": "--processes",
    "encode --config-name=pretrain_8b_image data.feature_cache.modalities=[image]": "gib=0",
    "plan --config-name=nothing --gpus=64 --gpu=h100-80gb": "nothing.yaml",
}


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter: in the tests' own processes everything is imported already."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_imports_nothing_slow(words: list[str]) -> None:
    done = python("-c", CODE, *words)
    assert json.loads(done.stdout.split("FOUND")[1]) == [] and done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of an exported model with images only, and a recording."""
    folder = tmp_path_factory.mktemp("export")
    settings = {"model_type": "anymal", "modalities": {"image": {"kind": "image"}}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "walk.npy").write_bytes(b"")
    (folder / "integrity.yaml").write_text("classifiers: {words: {kind: text, treshold: 0.5}}")
    (folder / "prompts.jsonl").write_text('{"parts": [{"text": "hi"}]}')
    return folder


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_imports_nothing_slow(line: str, export: Path) -> None:
    block = f"import sys\nfor name in {SLOW}:\n    sys.modules[name] = None\n"
    code = f"{block}from megatron_anymal.__main__ import command\nsys.argv[0] = 'anymal'\ncommand()"
    done = python("-c", code, *line.replace("EXPORT", str(export)).split())
    assert done.returncode == 2 and REFUSED[line] in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_data_of_all_modalities_in_new_processes(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    """Both verbs keep torch out where the modalities allow it; CLAP's preprocessing of audio does not."""
    folder = tmp_path / "shards"
    shutil.copytree(mixed_shards, folder, ignore=shutil.ignore_patterns("index"))
    anymal, tokenizer = ("-m", "megatron_anymal"), f"--tokenizer={tokenizer_folder}"
    prepared = python(*anymal, "prepare", f"--index-only={folder}", tokenizer, "--attribute=imu.rate=100")
    assert prepared.returncode == 0 and "40 samples" in prepared.stdout, prepared.stderr
    inspected = python(*anymal, "inspect", str(folder), tokenizer)
    assert inspected.returncode == 0 and "read 40 of 40 samples with their media: none bad" in inspected.stdout


@pytest.mark.parametrize(("kind", "hidden"), [("text", True), ("image", True), ("imu", True), ("audio", False)])
def test_torch_is_imported_for_modalities_that_need_it(
    kind: str, hidden: bool, tokenizer_folder: str, tmp_path: Path
) -> None:
    folder = make_shards(tmp_path / kind, tokenizer_folder, 4, (kind,))
    code = "import sys\nfrom megatron_anymal.__main__ import main\ncode = main(sys.argv[1:])\n"
    done = python(
        "-c",
        f"{code}print(code, sys.modules.get('torch') is None)",
        "inspect",
        folder,
        f"--tokenizer={tokenizer_folder}",
    )
    assert done.stdout.splitlines()[-1] == f"0 {hidden}", done.stderr
