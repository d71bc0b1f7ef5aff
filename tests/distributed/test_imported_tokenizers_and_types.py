"""Import and export of published Llama folders: other dtypes, variants, odd values, and no tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_server import run_in_rank
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import LLAMA
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools.export_hf import main as export_hf
from checkpoint_tools.import_hf import main as import_hf

ONE_BY_ONE = """
import importlib, json, sys
for name, *arguments in json.loads(sys.argv[1]):
    if code := importlib.import_module(f"checkpoint_tools.{name}").main(arguments):
        sys.exit(f"{name} ended with {code}")
"""


def published(folder: Path, dtype: torch.dtype) -> Path:
    """Folder of a Llama without a tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(dtype).save_pretrained(folder)
    return folder


def import_llama(folder: Path, out: Path) -> int:
    return run_ranks(1, import_hf, ["--hf", str(folder), "--out", str(out), "--processes", "1"])[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_it_is_verified_in_the_type_it_is_stored_in(
    dtype: torch.dtype, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    source = published(tmp_path / "hf", dtype)
    assert import_llama(source, tmp_path / "checkpoint") == 0
    arguments = ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out"), "--llama-only"]
    assert run_in_rank(export_hf, arguments) == 0
    captured = capfd.readouterr()
    assert "left out: a tokenizer; the checkpoint's run or import had none" in captured.out
    [row] = json.loads((tmp_path / "out" / "verification.json").read_text())["rows"]
    assert row["max_difference"] < 1e-5 and row["same_choice"] == 1.0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == dtype for name, tensor in before.items())


@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "model.fp16-00001-of-00001.safetensors",
        "model-00001-of-00001.bf16.safetensors",
    ],
)
def test_a_variant_beside_the_weights_is_named_and_not_read(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    source = published(tmp_path / "hf", torch.float32)
    shutil.copyfile(published(tmp_path / "half", torch.float16) / "model.safetensors", source / name)
    assert import_llama(source, tmp_path / "checkpoint") == 0
    assert f"left out: {name}, a variant of the weights" in capfd.readouterr().out
    (source / "model.safetensors").unlink()
    assert import_llama(source, tmp_path / "other") == 2
    assert f"the variant '{name}' only" in capfd.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", "500000.0"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "1e4"}),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("rms_norm_eps", "1e-5"),
        ("hidden_size", "32"),
        ("hidden_size", None),
    ],
)
def test_a_value_of_another_type_is_named(
    key: str, value: object, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    source = published(tmp_path / "hf", torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    if key.startswith("rope"):
        del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    assert import_llama(source, tmp_path / "checkpoint") == 2
    message = capfd.readouterr().err.splitlines()[-1]
    inner = {"rope_parameters": "rope_theta", "rope_scaling": "factor"}.get(key, key)
    assert message.startswith("error: ") and str(source / "config.json") in message and inner in message, message
    assert "Correct it" in message


def test_commands_say_nothing_but_their_own(tmp_path: Path) -> None:
    source = published(tmp_path / "hf", torch.float16)
    checkpoint, out, cut = (str(tmp_path / name) for name in ("checkpoint", "out", "cut"))
    sizes = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2"]
    commands = (
        ["import_hf", "--hf", str(source), "--out", checkpoint],
        # Before the commands that join a job, because this one simulates the ranks of a job.
        ["reshard", "--checkpoint", checkpoint, "--out", cut, *sizes],
        ["inspect", checkpoint],
        ["export_hf", "--checkpoint", checkpoint, "--out", out, "--llama-only"],
        ["verify", "--checkpoint", checkpoint, "--export", out],
    )
    # All in one new interpreter, so that messages of libraries on import would be seen.
    done = subprocess.run([sys.executable, "-c", ONE_BY_ONE, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith(("importing:", "exporting:", "resharding:"))] == []
