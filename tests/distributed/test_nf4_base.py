"""Runs on a base in NF4: the same as on a plain base of its values, under every layout; resumed; exported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import losses, train
from export_server import run_in_rank
from nf4_base import NEEDS_BITSANDBYTES, SHAPE, make_llama, make_rounded_llama, rounded_to_nf4
from parity.discrete import SECTIONS, codes_in_documents
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import make_config, make_conversations

from checkpoint_tools import export_hf
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import LoraConfig, RunConfig

pytestmark = NEEDS_BITSANDBYTES
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def rounded(base: str) -> str:
    return make_rounded_llama(base, Path(base).with_name("rounded"))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    return make_conversations(tmp_path_factory.mktemp("data") / "conversations", tokenizer_folder, 24)


@pytest.fixture
def configs(mixed_shards: str, conversations: str, tokenizer_folder: str, tmp_path: Path) -> dict[str, RunConfig]:
    """An alignment run, and an SFT run with adapters."""
    runs = {}
    for job, data in (("pretrain", mixed_shards), ("sft", conversations)):
        config = make_config(data, tokenizer_folder, tmp_path / job)
        config.job, config.trainer.max_steps, config.data.seq_length = job, 3, 96
        config.model.language_model.config = {}
        # With the default, gradients of 0 but for rounding (those of A while B is 0) would become whole steps.
        config.model.optim.eps = 1e-2
        if job == "sft":
            config.model.lora = LoraConfig(r=4, alpha=8.0, dropout=0.1)
        runs[job] = config
    return runs


def train_on_codes(config: RunConfig) -> dict[str, Any]:
    """In a rank: train on documents with marks and codes in place of some of their words."""
    model = copy.deepcopy(config.model)
    model.language_model.config = {"vocab_size": SHAPE["vocab_size"]}
    with codes_in_documents(model):
        return train(config)


def trained(config: RunConfig, base: str, quantization: str, name: str, **layout: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config.exp_manager.explicit_log_dir += f"_{name.replace(' ', '_')}"
    config.model.language_model.path, config.model.base_quantization = base, quantization
    for key, value in layout.items():
        setattr(config.model, key, value)
    config.trainer.devices = config.model.model_parallel_size
    results = run_ranks(config.trainer.devices, train_on_codes if config.model.discrete else train, config)[0]
    return {**results, "folder": config.exp_manager.explicit_log_dir}


@pytest.mark.parametrize("job", ["pretrain", "sft"])
def test_training_equals_that_on_a_plain_base_of_its_values(
    configs: dict[str, RunConfig], base: str, rounded: str, job: str
) -> None:
    plain = trained(configs[job], rounded, "", "plain")
    unrounded = trained(configs[job], base, "", "unrounded")
    for name, layout in LAYOUTS.items():
        held = trained(configs[job], base, "nf4", name, **layout)
        np.testing.assert_allclose(held["losses"], plain["losses"], rtol=1e-5, err_msg=name)
        assert held["weights"].keys() == plain["weights"].keys()
        for weight, value in plain["weights"].items():
            np.testing.assert_allclose(held["weights"][weight], value, rtol=1e-4, atol=1e-5, err_msg=f"{name} {weight}")
        # Adapters and projectors of the one fit the other's base.
        manifests = [store.read_manifest(store.resolve(run["folder"])) for run in (held, unrounded)]
        assert manifests[0].base_hash == manifests[1].base_hash
    assert np.abs(np.subtract(unrounded["losses"], plain["losses"])).max() > 1e-3


def test_rows_of_marks_and_codes_train_as_on_a_plain_base_of_its_values(
    configs: dict[str, RunConfig], base: str, rounded: str, text_shards: str
) -> None:
    config = configs["pretrain"]
    config.model.modalities, config.model.discrete = {}, dict(SECTIONS)
    config.data.train["mix"].path = text_shards
    plain = trained(config, rounded, "", "plain")
    for name, layout in LAYOUTS.items():
        held = trained(config, base, "nf4", name, **layout)
        np.testing.assert_allclose(held["losses"], plain["losses"], rtol=1e-5, err_msg=name)
        for weight, value in plain["weights"].items():
            np.testing.assert_allclose(held["weights"][weight], value, rtol=1e-4, atol=1e-5, err_msg=f"{name} {weight}")
    assert len(set(plain["losses"])) == 3


def test_a_resume_repeats_the_undisturbed_run(configs: dict[str, RunConfig], base: str) -> None:
    config = configs["sft"]
    config.exp_manager.checkpoint.every_n_train_steps, config.model.optim.sched.decay_steps = 2, 4
    config.trainer.max_steps = 4
    whole = trained(config, base, "nf4", "whole")
    for steps in (2, 4):
        config.trainer.max_steps = steps
        parts = trained(config, base, "nf4", "parts")
    assert losses(Path(parts["folder"])) == whole["losses"]
    for name, value in whole["weights"].items():
        np.testing.assert_array_equal(parts["weights"][name], value, err_msg=name)
    saved = [
        name for name in StreamReader(store.resolve(whole["folder"])).tensors if name.startswith("language_model.")
    ]
    assert saved and all(".lora." in name for name in saved)


def test_preferences_and_their_reference_equal_those_on_a_plain_base_of_its_values(
    configs: dict[str, RunConfig], base: str, rounded: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    pairs = make_conversations(tmp_path / "pairs", tokenizer_folder, 24, pairs=True)
    dpo_losses = {}
    for folder, quantization, name in ((base, "nf4", "held"), (rounded, "", "plain")):
        sft = trained(configs["sft"], folder, quantization, name)
        config = copy.deepcopy(configs["sft"])
        config.job, config.data.train["mix"].path, config.model.restore_from_path = "dpo", pairs, sft["folder"]
        config.data.seq_length = 192
        for modality in config.model.modalities.values():
            modality.encoder.freeze = modality.projector.freeze = True
        dpo_losses[name] = trained(config, folder, quantization, f"dpo {name}")["losses"]
    np.testing.assert_allclose(dpo_losses["held"], dpo_losses["plain"], rtol=1e-5)
    assert len(set(dpo_losses["held"])) == 3


def test_an_export_adds_the_adapters_to_the_unquantized_base(
    configs: dict[str, RunConfig], base: str, tmp_path: Path
) -> None:
    config = configs["sft"]
    config.trainer.precision, config.model.optim.lr = "bf16", 1e-2
    run = trained(config, base, "nf4", "exported", tensor_model_parallel_size=2)
    out = tmp_path / "model"
    assert run_in_rank(export_hf.main, ["--checkpoint", run["folder"], "--out", str(out)]) == 0
    assert json.loads((out / "verification.json").read_text())
    source, exported = load_file(f"{base}/model.safetensors"), load_file(out / "model.safetensors")
    name, key = "model.layers.1.mlp.down_proj.weight", "language_model.decoder.layers.1.mlp.linear_fc2.lora.down_proj"
    a, b = (torch.from_numpy(run["weights"][f"{key}.{half}"]).double() for half in "AB")
    delta = 8.0 / 4 * b @ a
    before = source[name].bfloat16()
    merged = exported[f"language_model.{name}"]
    torch.testing.assert_close(merged, (before.double() + delta).bfloat16(), rtol=0, atol=0)
    # Merged into NF4, the same change would be lost in the rounding.
    held = rounded_to_nf4(source[name]).double()
    in_nf4 = rounded_to_nf4((held + delta).float()).double()
    assert lost(merged.double() - before.double(), delta) < 0.3 < 1 < lost(in_nf4 - held, delta)


def lost(change: torch.Tensor, delta: torch.Tensor) -> float:
    """Error of a change of weights, as a share of the change that was meant."""
    return float((change - delta).norm() / delta.norm())
