"""`.nemo` archives of a run on a base in NF4: they hold the unquantized base, under every layout."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from nf4_base import NEEDS_BITSANDBYTES, SHAPE, make_llama, rounded_to_nf4
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import make_config
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools import export_hf, import_hf
from megatron_anymal.config import LanguageModelConfig, RunConfig
from megatron_anymal.model.hf_llama import to_hf
from megatron_anymal.model.unsharded_weights import gather_weights, hash_weights
from megatron_anymal.nemo import archive
from megatron_anymal.nemo.model import MegatronAnyMALModel, from_cfg

pytestmark = NEEDS_BITSANDBYTES
FC2, DOWN = "language_model.decoder.layers.2.mlp.linear_fc2.weight", "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.model.language_model.path, config.model.language_model.config = make_llama(tmp_path / "base"), {}
    config.model.base_quantization, config.data.seq_length, config.trainer.max_steps = "nf4", 96, 1
    return config


def llama_hash(model: MegatronAnyMALModel) -> str:
    return hash_weights(model.state.models, "language_model.")


def save(config: RunConfig, path: Path) -> str:
    """In a rank: train, and write an archive; return the base's hash."""
    model = MegatronAnyMALModel(config)
    model.fit()
    model.save_to(path)
    return llama_hash(model)


def restore(path: Path, again: Path) -> tuple[str, np.ndarray]:
    """In a rank: return the hash of the restored base and a matrix of it, and write the archive anew."""
    cfg: Any = MegatronAnyMALModel.restore_from(path, return_config=True)
    config = from_cfg(cfg)
    config.trainer.devices = config.model.tensor_model_parallel_size = config.model.pipeline_model_parallel_size = 1
    config.exp_manager.explicit_log_dir = str(path.parent / "restored")
    model = MegatronAnyMALModel.restore_from(path, override_config_path=config)
    assert isinstance(model, MegatronAnyMALModel)
    held = gather_weights(model.state.models, FC2)
    model.save_to(again)
    assert held is not None
    return llama_hash(model), held[FC2].numpy()


@pytest.mark.parametrize(
    ("parallelism", "imported"), [("tensor_model_parallel_size", False), ("pipeline_model_parallel_size", True)]
)
def test_it_holds_the_base_as_it_was_before_quantization(
    config: RunConfig, tmp_path: Path, parallelism: str, imported: bool
) -> None:
    setattr(config.model, parallelism, 2)
    config.trainer.devices = 2
    llama = config.model.language_model
    original = LlamaForCausalLM.from_pretrained(llama.path).state_dict()
    if imported:
        assert import_hf.main(["--hf", llama.path, "--out", str(tmp_path / "imported")]) == 0
        llama.path, llama.checkpoint = "", str(tmp_path / "imported")
    path, again = tmp_path / "model.nemo", tmp_path / "again.nemo"
    saved_hashes = run_ranks(2, save, config, path)
    restored_hash, held = run_ranks(1, restore, path, again)[0]
    for file in (path, again):
        tensors = archive.read(file, tmp_path / "unpacked")[1]
        archived = {
            to: tensor
            for name in tensors
            if name.startswith("language_model.")
            for to, tensor in to_hf(name, LlamaConfig(**SHAPE), tensors[name]).items()
        }
        assert archived.keys() == original.keys()
        assert all(torch.equal(archived[name], value) for name, value in original.items())
    assert {*saved_hashes} == {restored_hash}
    np.testing.assert_array_equal(held, rounded_to_nf4(original[DOWN]).numpy())


def save_after_a_change(config: RunConfig, path: Path) -> None:
    """In a rank: the base's file is changed between training and saving."""
    model = MegatronAnyMALModel(config)
    model.fit()
    if dist.get_rank() == 0:
        file = Path(config.model.language_model.path) / "model.safetensors"
        tensors = load_file(file)
        tensors[DOWN][5, 7] += 0.1
        file.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    dist.barrier()
    with pytest.raises(OSError, match=rf"nemo could not be written: The unquantized values of {FC2} have changed"):
        model.save_to(path)
    assert not path.exists()


def test_a_base_that_has_changed_is_refused_on_every_rank(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.devices = config.model.pipeline_model_parallel_size = 2
    run_ranks(2, save_after_a_change, config, tmp_path / "model.nemo")


def continue_and_export(path: Path, folder: Path, llama: str) -> tuple[int, list[str]]:
    """In a rank: train one step from an archive, with the Llama's folder named, and export; return the printed
    errors."""
    cfg: Any = MegatronAnyMALModel.restore_from(path, return_config=True)
    config = from_cfg(cfg)
    config.exp_manager.explicit_log_dir, config.model.base_quantization = str(folder / "next"), ""
    if llama:
        config.model.language_model = LanguageModelConfig(path=llama)
    model = MegatronAnyMALModel.restore_from(path, override_config_path=config)
    assert isinstance(model, MegatronAnyMALModel)
    model.fit()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = export_hf.main(["--checkpoint", str(folder / "next"), "--out", str(folder / "exported")])
    return code, [line for line in errors.getvalue().splitlines() if line.startswith("error")]


def test_a_run_continued_from_it_is_exported_with_the_llamas_folder(config: RunConfig, tmp_path: Path) -> None:
    path, llama = tmp_path / "model.nemo", config.model.language_model.path
    run_ranks(1, save, config, path)
    [(code, errors)] = run_ranks(1, continue_and_export, path, tmp_path / "without", "")
    assert code == 2 and "does not have the weights that this checkpoint was trained with" in errors[0]
    assert run_ranks(1, continue_and_export, path, tmp_path / "with", llama) == [(0, [])]
    exported = load_file(tmp_path / "with" / "exported" / "model.safetensors")
    assert torch.equal(exported[f"language_model.{DOWN}"], load_file(Path(llama) / "model.safetensors")[DOWN])
