"""Exports loaded by transformers alone match the trainer's model, and no faulty export is published."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import train
from export_server import run_in_rank
from peft import PeftModel
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import LLAMA, make_config, make_conversations
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from checkpoint_tools import export_hf, verify
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.data.chat_format import open_prompt, parse_messages
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.generation.export_generator import ExportedGenerator


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HuggingFace folder of a Llama with several weight files."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str, base: Path) -> RunConfig:
    """An SFT run on two tensor-parallel ranks that trains adapters, three projectors and an encoder."""
    folder = tmp_path_factory.mktemp("export")
    make_conversations(folder / "data", tokenizer_folder, 24)
    config = make_config(str(folder / "data"), tokenizer_folder, folder / "sft")
    config.job, config.data.seq_length = "sft", 96
    config.model.language_model.config, config.model.language_model.path = {}, str(base)
    config.model.lora = LoraConfig(
        r=4, alpha=8.0, targets=["q_proj", "v_proj", "o_proj", "layers.1.mlp.*", "down_proj"]
    )
    config.model.optim.lr, config.trainer.max_steps = 3e-2, 3
    config.trainer.devices = config.model.tensor_model_parallel_size = 2
    run_ranks(2, train, config)
    return config


def export(run: RunConfig, out: Path, *further: str) -> int:
    """Export in a new process, because the trainer's model initializes a process group of one."""
    arguments = ["--checkpoint", run.exp_manager.explicit_log_dir, "--out", str(out), *further]
    return run_in_rank(export_hf.main, arguments)


@pytest.fixture(scope="module")
def exported(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert export(run, out, "--max-shard-gib", "0.00006") == 0
    return out


def test_the_export_is_verified_and_says_so(run: RunConfig, exported: Path, capfd: pytest.CaptureFixture) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = {name for name in index["weight_map"].values()}
    assert len(files) > 1
    assert sum(t.nbytes for f in files for t in load_file(exported / f).values()) == index["metadata"]["total_size"]
    card = (exported / "README.md").read_text()
    for text in (
        "supervised fine-tuning",
        "| image | 2 |",
        "| all together | 1 |",
        *files,
        "adapters are merged",
        "pipeline_tag: image-text-to-text",
    ):
        assert text in card
    arguments = ["--checkpoint", run.exp_manager.explicit_log_dir, "--export", str(exported)]
    assert run_in_rank(verify.main, arguments) == 0
    assert "verified imu: 2 sample(s)" in capfd.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.mlp.up_proj.weight",
        pytest.param("projectors.imu.linears.0.bias", marks=pytest.mark.slow),
    ],
)
def test_one_wrong_tensor_is_found(
    run: RunConfig, exported: Path, name: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(exported, wrong)
    file = wrong / json.loads((wrong / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ["--checkpoint", run.exp_manager.explicit_log_dir, "--export", str(wrong)]
    assert run_in_rank(verify.main, arguments) == 1
    assert "logits differ by up to" in capfd.readouterr().err


@pytest.mark.slow
def test_another_preparation_of_media_is_found(
    run: RunConfig, exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(exported, wrong)
    section = json.loads((wrong / "processor_config.json").read_text())
    section["modalities"]["image"]["options"] = {"image_mean": [0.5, 0.5, 0.5]}
    (wrong / "processor_config.json").write_text(json.dumps(section))
    arguments = ["--checkpoint", run.exp_manager.explicit_log_dir, "--export", str(wrong)]
    assert run_in_rank(verify.main, arguments) == 1
    assert "preprocesses 'image' differently" in capfd.readouterr().err


def test_the_adapter_for_peft_equals_the_merged_weights(run: RunConfig, tmp_path: Path) -> None:
    assert export(run, tmp_path / "merged", "--llama-only") == 0
    assert export(run, tmp_path / "apart", "--llama-only", "--adapter", "separate") == 0
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "apart", dtype=torch.float32).eval()
    tokens = torch.randint(32, (2, 20))
    with torch.no_grad():
        expected, before = merged(tokens).logits, plain(tokens).logits
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / "apart" / "adapter")).eval()
        torch.testing.assert_close(adapted(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert (before - expected).abs().max() > 0.05


@pytest.fixture(scope="module")
def apart(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export of the whole model with separate adapters."""
    out = tmp_path_factory.mktemp("apart") / "model"
    assert export(run, out, "--adapter", "separate") == 0
    return out


def answering_weights(folder: str, peft: bool) -> dict[str, np.ndarray]:
    """Return the weights that `anymal generate` uses for an export."""
    if not peft:
        sys.modules["peft"] = None  # type: ignore[assignment]
    config = json.loads((Path(folder) / "config.json").read_text())
    generator = ExportedGenerator.of_folder(folder, config, "cpu", "float32", trust_remote_code=False)
    return {name: tensor.numpy() for name, tensor in generator._model.state_dict().items()}


def test_adapters_beside_the_weights_take_part_in_answers(apart: Path, exported: Path) -> None:
    [merged] = run_ranks(1, answering_weights, str(exported), True)
    [beside] = run_ranks(1, answering_weights, str(apart), True)
    assert beside.keys() == merged.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(beside[name], tensor, rtol=1e-6, atol=1e-6)
    assert "`adapter/adapter_model.safetensors`" in (apart / "README.md").read_text()
    with pytest.raises(pytest.fail.Exception, match="pip install peft, or export with --adapter merged"):
        run_ranks(1, answering_weights, str(apart), False)


def refused_answers(folder: str) -> str:
    with pytest.raises(CheckpointError) as error:
        answering_weights(folder, True)
    return str(error.value)


def test_damaged_adapters_are_refused(apart: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(apart, damaged)
    file = damaged / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = sorted(name for name in tensors if "lora_B" in name)[0]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    message = run_ranks(1, refused_answers, str(damaged))[0]
    assert "missing adapter keys" in message and lost.removesuffix(".weight") in message and "Export again" in message
    os.truncate(file, file.stat().st_size // 2)
    assert f"'{file.parent}' cannot be loaded" in run_ranks(1, refused_answers, str(damaged))[0]
    file.unlink()
    assert f"'{file.parent}' cannot be loaded" in run_ranks(1, refused_answers, str(damaged))[0]


def test_a_wrong_adapter_is_found(run: RunConfig, apart: Path, tmp_path: Path, capfd: Any) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(apart, wrong)
    file = wrong / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {name: -tensor if name.endswith("lora_A.weight") else tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ["--checkpoint", run.exp_manager.explicit_log_dir, "--export", str(wrong)]
    assert run_in_rank(verify.main, arguments) == 1
    assert "logits differ by up to" in capfd.readouterr().err


@pytest.mark.slow
def test_the_base_without_adapters_keeps_its_bytes(run: RunConfig, base: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "apart", "--llama-only", "--adapter", "separate", "--no-verify") == 0
    source = {name: t for file in base.glob("*.safetensors") for name, t in load_file(file).items()}
    tensors = load_file(tmp_path / "apart" / "model.safetensors")
    assert tensors.keys() == source.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in source.items())


def test_the_chat_template_is_the_layout_of_training(run: RunConfig, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    content = [{"text": " what is"}, {"media": "x", "modality": "image"}, {"text": " this "}]
    messages = [{"role": "system", "content": " a sound "}, {"role": "user", "content": content}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    own = Tokenizer(run.data.tokenizer)
    placeholder = own.placeholder(run.model.modalities["image"].placeholder, "")
    parts = open_prompt(parse_messages(messages, ""))
    assert ids == own.document(parts, [1], {"image": placeholder}, closed=False).tokens
    with pytest.raises(Exception, match="takes no smell"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "smell"}]}])


def test_another_chat_template_than_trained_with_is_found(
    run: RunConfig, exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(exported, wrong)
    template = (wrong / "chat_template.jinja").read_text()
    (wrong / "chat_template.jinja").write_text(template.replace("turn.text | trim", "turn.text ~ 'what'"))
    arguments = ["--checkpoint", run.exp_manager.explicit_log_dir, "--export", str(wrong)]
    assert run_in_rank(verify.main, arguments) == 1
    assert "training produces" in capfd.readouterr().err


def test_an_export_never_replaces_without_being_told(run: RunConfig, exported: Path, capfd: Any) -> None:
    before = sorted(exported.iterdir())
    assert export(run, exported) == 2
    assert "--overwrite" in capfd.readouterr().err
    assert sorted(exported.iterdir()) == before


@pytest.fixture
def another_base(run: RunConfig, base: Path) -> Iterator[None]:
    """Change one value in the Llama's folder for the duration of a test."""
    [file] = [f for f in base.glob("*.safetensors") if "model.norm.weight" in load_file(f)]
    kept, tensors = file.read_bytes(), load_file(file)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    yield
    file.write_bytes(kept)


@pytest.mark.usefixtures("another_base")
def test_another_base_than_the_runs_is_refused(run: RunConfig, base: Path, tmp_path: Path, capfd: Any) -> None:
    assert export(run, tmp_path / "out") == 2
    assert f"The Llama in {str(base)!r} does not have the weights" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def full_disk(arguments: list[str]) -> int:
    """Export to a disk that is full after the first tensors."""
    from megatron_anymal import safetensors_io

    write, count = safetensors_io.HashedFile.write, 0

    def limited(self: Any, data: Any) -> int:
        nonlocal count
        count += 1
        if count > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    safetensors_io.HashedFile.write = limited  # type: ignore[method-assign]
    return export_hf.main(arguments)


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(run: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arguments = ["--checkpoint", run.exp_manager.explicit_log_dir, "--out", str(tmp_path / "out")]
    assert run_ranks(1, full_disk, arguments) == [2]
    assert f"the disk of --out='{tmp_path / 'out'}' is full" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_tensors_that_belong_nowhere_are_named(run: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = store.resolve(run.exp_manager.explicit_log_dir)
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    # Remove a modality from the configuration whose projector is in the checkpoint.
    del manifest["config"]["model"]["modalities"]["imu"]
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    (copy / "manifest.json").write_text(json.dumps({**body, "checksum": store._checksum(body)}))
    assert run_in_rank(export_hf.main, ["--checkpoint", copy, "--out", tmp_path / "out"]) == 2
    assert "encoders.imu" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_merged_adapters_of_a_bf16_run_are_verified_as_they_are_rounded(run: RunConfig, tmp_path: Path) -> None:
    config = copy.deepcopy(run)
    config.trainer.precision, config.trainer.devices, config.model.tensor_model_parallel_size = "bf16", 1, 1
    config.exp_manager.explicit_log_dir = str(tmp_path / "run")
    run_ranks(1, train, config)
    assert export(config, tmp_path / "merged", "--llama-only") == 0
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert export(config, tmp_path / "apart", "--llama-only", "--adapter", "separate") == 0
    # A wrong merged weight is still detected.
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, :4] += weights[name][0, :4].abs().max()
    save_file(weights, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--checkpoint", config.exp_manager.explicit_log_dir, "--export", str(tmp_path / "merged")]
    assert run_in_rank(verify.main, arguments) == 1
