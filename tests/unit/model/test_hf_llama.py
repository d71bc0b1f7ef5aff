"""Conversion between HuggingFace's tensors and ours is bit-exact in both directions, and every tensor is accounted
for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_anymal.config import ConfigError
from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.hf_llama import (
    account,
    checkpoint_position,
    expected_tensors,
    from_hf,
    hf_names,
    to_hf,
    whole_names,
    whole_shape,
)

SIZES = {
    "vocab_size": 33,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}


def folder_of(path: Path, **changes: object) -> tuple[LlamaConfig, Path]:
    hf = LlamaConfig(**{**SIZES, **changes})
    torch.manual_seed(0)
    LlamaForCausalLM(hf).save_pretrained(str(path))
    return hf, path


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 10}, {"num_key_value_heads": 1}])
def test_there_and_back(changes: dict[str, object], tmp_path: Path) -> None:
    hf, folder = folder_of(tmp_path, **changes)
    theirs = HFWeights(folder)
    assert account(hf, theirs) == []
    assert expected_tensors(hf) == {name: theirs.entry(name).shape for name in theirs}
    used = []
    for name in whole_names(hf):
        whole = from_hf(name, hf, theirs.__getitem__)
        assert tuple(whole.shape) == whole_shape(name, hf)
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            whole = torch.cat([whole, torch.ones(3, whole.size(1))])
        back = to_hf(name, hf, whole)
        assert list(back) == hf_names(name, hf)
        for hf_name, tensor in back.items():
            assert torch.equal(tensor, theirs[hf_name]), hf_name
            used.append(hf_name)
    assert sorted(used) == sorted(theirs)


def test_places_in_a_checkpoint() -> None:
    layers = "language_model.decoder.layers."
    assert checkpoint_position(f"{layers}11.mlp.linear_fc1.weight") == (f"{layers}mlp.linear_fc1.weight", 11)
    norm = f"{layers}3.pre_mlp_layernorm.weight"
    assert checkpoint_position(norm) == (f"{layers}mlp.linear_fc1.layer_norm_weight", 3)
    for name in (
        "language_model.decoder.final_layernorm.weight",
        f"{layers}3.self_attention.linear_qkv.lora.a",
        "projectors.image.layers.0.query.weight",
    ):
        assert checkpoint_position(name) == (name, None)


def change(folder: Path, add: dict[str, torch.Tensor], drop: str = "") -> HFWeights:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **add}
    tensors.pop(drop, None)
    save_file(tensors, file, metadata={"format": "pt"})
    return HFWeights(folder)


def frequencies(theta: float = 10000.0) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, 4, 2).float() / 4)


def test_buffers_and_copies_that_may_be_left_out(tmp_path: Path) -> None:
    hf, folder = folder_of(tmp_path, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    notes = account(hf, change(folder, {"lm_head.weight": embedding.clone(), buffer: frequencies()}))
    assert len(notes) == 2 and any("tied" in note for note in notes) and any(buffer in note for note in notes)
    assert account(hf, change(folder, {buffer: frequencies().bfloat16()}))
    with pytest.raises(ConfigError, match="RoPE frequencies that differ"):
        account(hf, change(folder, {buffer: frequencies(500000.0)}))
    different = embedding.clone()
    different[-1, -1] += 1e-3
    with pytest.raises(ConfigError, match=r"'lm_head\.weight' in .* differs from .*tie_word_embeddings"):
        account(hf, change(folder, {buffer: frequencies(), "lm_head.weight": different}))


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    hf, folder = folder_of(tmp_path)
    norm, bias = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.bias"
    with pytest.raises(ConfigError, match=rf"'{bias}' in .*model\.safetensors' does not belong to a Llama"):
        account(hf, change(folder, {bias: torch.zeros(24)}))
    with pytest.raises(ConfigError, match=rf"'{norm}' in .*model\.safetensors' has shape \[23\].*\[24\]"):
        account(hf, change(folder, {norm: torch.ones(23)}, drop=bias))
    with pytest.raises(ConfigError, match="quantized"):
        account(hf, change(folder, {norm: torch.ones(24, dtype=torch.int8)}))
    with pytest.raises(ConfigError, match=f"lacks the tensor '{norm}'"):
        account(hf, change(folder, {}, drop=norm))
    more = LlamaConfig(**{**json.loads((folder / "config.json").read_text()), "num_hidden_layers": 1})
    with pytest.raises(ConfigError, match=r"'model\.layers\.1\..*' in .* does not belong to a Llama"):
        account(more, HFWeights(folder))
