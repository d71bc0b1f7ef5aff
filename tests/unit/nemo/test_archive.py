"""`.nemo` archives: contents, lazily read weights, and saving under one layout and restoring under another."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import LLAMA, make_config, make_shards, make_tokenizer

from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.model.unsharded_weights import gather_weights
from megatron_anymal.nemo import archive
from megatron_anymal.nemo.model import MegatronAnyMALModel, from_cfg


def test_archived_tensors_are_those_written(tmp_path):
    shared = torch.randn(6, 4)
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "odd": torch.arange(3, dtype=torch.uint8),
        "f32": torch.randn(2, 3, 4),
        "scalar": torch.tensor(7.0, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "tied": shared,
        "other": shared,
        "slice": shared[2:4],
        "flag": torch.tensor([True, False]),
    }
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    (tmp_path / "tok" / "README.md").write_text("not needed")
    path = tmp_path / "deep" / "a.nemo"
    archive.write(path, "run: {}\n", {"tokenizer": tmp_path / "tok"}, tensors)
    text, archived = archive.read(path, tmp_path / "out")
    assert text == "run: {}\n" and set(archived) == set(tensors) and len(archived) == len(tensors)
    for name, tensor in tensors.items():
        assert archived[name].dtype == tensor.dtype and torch.equal(archived[name], tensor), name
    assert [file.name for file in (tmp_path / "out" / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert [file.name for file in path.parent.iterdir()] == ["a.nemo"]
    # The weights form a complete safetensors file that other tools can read.
    with tarfile.open(path) as tar:
        tar.extract(archive.WEIGHTS_NAME, tmp_path, filter="data")
    assert torch.equal(load_file(tmp_path / archive.WEIGHTS_NAME)["bf16"], tensors["bf16"])


def test_wrong_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*gone\.nemo"):
        archive.read(tmp_path / "gone.nemo", tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "b.nemo")
    with pytest.raises(ConfigError, match=r"cannot be read as a \.nemo archive"):
        archive.read(tmp_path / "b.nemo", tmp_path)
    with tarfile.open(tmp_path / "c.nemo", "w:") as tar:
        tar.add(tmp_path / "b.nemo", arcname="model_weights.ckpt")
    with pytest.raises(ConfigError, match=r"holds no model_config\.yaml"):
        archive.read(tmp_path / "c.nemo", tmp_path)


def test_portable_and_unpacked_paths(tmp_path):
    config = make_config("data", "tok", tmp_path)
    config.model.modalities["image"].encoder.path, config.model.modalities["image"].encoder.config = "clip", {}
    config.model.restore_from_path = "somewhere"
    config.model.language_model.path, config.model.language_model.config = "llama", {}
    result, folders = archive.portable(config, LLAMA)
    assert folders == {"encoders/image": Path("clip"), "tokenizer": Path("tok")}
    assert result.model.language_model.config == LLAMA and not result.model.language_model.path
    assert not result.model.restore_from_path and result.data.train == config.data.train
    back = archive.unpacked(result, Path("/x"))
    assert back.model.modalities["image"].encoder.path == "/x/encoders/image" and back.data.tokenizer == "/x/tokenizer"
    assert config.model.language_model.path == "llama", "the run's own configuration must not change"


def gathered(model: MegatronAnyMALModel) -> dict[str, torch.Tensor] | None:
    tensors = gather_weights(model.state.models)
    return None if tensors is None else {name: tensor.contiguous() for name, tensor in tensors.items()}


def save(folder: Path, config: RunConfig) -> None:
    """In a rank: train, then write an archive and the weights it must contain."""
    model = MegatronAnyMALModel(config)
    model.fit()
    model.save_to(folder / "saved" / "model.nemo")
    # On every rank the file exists once save_to returns.
    assert (folder / "saved" / "model.nemo").is_file()
    tensors = gathered(model)
    if tensors is not None:
        save_file(tensors, folder / "expected.safetensors")


def restore(folder: Path) -> int:
    """In a rank: compare the archive's weights, train one step from them, and return their number."""
    archive = folder / "saved" / "model.nemo"
    cfg: Any = MegatronAnyMALModel.restore_from(archive, return_config=True)
    config = from_cfg(cfg)
    config.trainer.devices, config.model.tensor_model_parallel_size = 1, 1
    config.exp_manager.explicit_log_dir = str(folder / "restored")
    # The initial values must have no influence.
    config.trainer.max_steps, config.model.seed = 1, 999
    model = MegatronAnyMALModel.restore_from(archive, override_config_path=config)
    assert isinstance(model, MegatronAnyMALModel)
    tensors, expected = gathered(model), load_file(folder / "expected.safetensors")
    assert tensors is not None and set(tensors) == set(expected)
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])]
    assert not different, different
    # The optimizer starts from the restored weights, not from the initial ones: one step moves no weight far.
    model.fit()
    trained = gathered(model)
    assert trained is not None
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in trained.items())
    moved = [name for name, tensor in trained.items() if not torch.allclose(tensor, expected[name], rtol=0, atol=0.05)]
    assert not moved, moved
    return len(expected)


def test_saved_under_tensor_parallelism_restored_alone(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    data = make_shards(tmp_path / "data", tokenizer, 24, ("image", "text"))
    config = make_config(data, tokenizer, tmp_path / "run")
    config.model.modalities = {"image": config.model.modalities["image"]}
    config.trainer.max_steps, config.trainer.devices, config.model.tensor_model_parallel_size = 2, 2, 2
    # In bf16 the optimizer keeps its own copy of the weights.
    config.trainer.precision = "bf16"
    run_ranks(2, save, tmp_path, config)
    # The archive must not depend on any other file of the machine that wrote it.
    shutil.rmtree(tokenizer)
    shutil.rmtree(tmp_path / "run")
    assert run_ranks(1, restore, tmp_path)[0] > 0
