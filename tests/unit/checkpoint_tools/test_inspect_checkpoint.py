"""Output of `checkpoint_tools.inspect` for a checkpoint written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoint_tools.inspect import main
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.checkpoint.tensor_stream import StreamWriter, write_index

TENSORS = {
    "language_model.decoder.layers.mlp.linear_fc2.weight": torch.zeros(4, 32, 48).bfloat16(),
    "language_model.decoder.layers.0.mlp.linear_fc2.lora.a": torch.zeros(2, 48),
    "projectors.image.latents": torch.zeros(2, 16),
    "projectors.image.gain": torch.ones(1),
    "projectors.audio.gain": torch.ones(1),
    "encoders.imu.gru.bias": torch.zeros(24),
    "optimizer.state.exp_avg.projectors.image.latents": torch.zeros(2, 16),
    "optimizer.state.exp_avg_sq.projectors.image.latents": torch.zeros(2, 16),
}


def checkpoint(root: Path, base_hash: str, source: str = "") -> Path:
    staging = root / "staging"
    (staging / "encoders" / "image").mkdir(parents=True)
    (staging / "encoders" / "image" / "model.safetensors").write_bytes(bytes(2_500_000))
    if source:
        (staging / "source.json").write_text(json.dumps({"llama": {"folder": source}, "encoders": {}}))
    file = StreamWriter(staging / "a.distcp")
    for name, tensor in TENSORS.items():
        file.add(name, tensor.shape, [0] * tensor.dim(), tensor)
    digests = write_index(staging, [file.close()], {"step": 7})
    config = {"model": {"language_model": {"path": "llamas/8b"}}}
    store.commit(staging, root / "done", Manifest(7, 56, config, {}, base_hash, "mix", {}), digests)
    return root / "done"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main([*arguments]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_parts_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, "abc")
    lines = told(capsys, str(folder))
    assert lines[0] == str(folder) and lines[1] == "step 7, 56 samples consumed"
    assert lines[2].startswith("5 files, 2.5 MB") and "all checksums match" in lines[2]
    assert lines[3:5] == ["base: frozen Llama abc, llamas/8b", "data: mix"]
    assert lines[5:] == [
        "Llama 1 tensors 6,144 parameters 0.0 MB",
        "adapters 1 tensors 96 parameters 0.0 MB",
        "encoders.imu 1 tensors 24 parameters 0.0 MB",
        "projectors.audio 1 tensors 1 parameters 0.0 MB",
        "projectors.image 2 tensors 33 parameters 0.0 MB",
        "optimizer 2 tensors 64 values 0.0 MB",
        f"encoder folder {folder}/encoders/image: 1 files, 2.5 MB",
    ]


def test_every_tensor_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, str(checkpoint(tmp_path, "abc")), "--tensors")
    assert "language_model.decoder.layers.mlp.linear_fc2.weight bfloat16 4x32x48 6,144" in lines
    assert all(any(line.startswith(name) for line in lines) for name in TENSORS)


def test_an_imported_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, str(checkpoint(tmp_path, "", source="/llamas/8b")))
    assert "base: none, the checkpoint holds the Llama imported from /llamas/8b" in lines


def test_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, "abc")
    (folder / "a.distcp").write_bytes(b"short")
    assert main([str(folder)]) == 2
    assert "a.distcp" in capsys.readouterr().err
