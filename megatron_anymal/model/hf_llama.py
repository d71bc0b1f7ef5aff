"""HuggingFace Llama weights and ours: the same tensors under other names and, for attention and MLP, joined.

Ours joins q, k and v by key/value group (the group's query heads, its key head, its value head) and gate and up
projection one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from megatron_anymal.config import ConfigError
from megatron_anymal.model.weights import Weight

_PLAIN = {
    "language_model.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "language_model.decoder.final_layernorm.weight": "model.norm.weight",
    "language_model.output_layer.weight": "lm_head.weight",
}
_LAYER = "language_model.decoder.layers."
_PLAIN_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def load_hf_llama(folder: str, hf: LlamaConfig, weights: Iterable[Weight]) -> None:
    """Set this rank's Llama weights from a HuggingFace folder, one tensor at a time.

    Raises:
        ConfigError: the folder lacks weights or a tensor, a file is damaged, or a tensor has another shape.
    """
    files = _files_by_tensor(Path(folder))
    opened: dict[str, Any] = {}

    def read(name: str) -> Tensor:
        if name not in files:
            raise ConfigError(f"model.language_model.path={folder!r} lacks the tensor {name!r}.")
        if files[name] not in opened:
            opened[files[name]] = _open(files[name])
        return opened[files[name]].get_tensor(name)

    for weight in weights:
        if not weight.name.startswith("language_model."):
            continue
        try:
            with torch.no_grad():
                weight.parameter.copy_(weight.local_part(from_hf(weight.name, hf, read)))
        except ValueError as error:
            raise ConfigError(f"model.language_model.path={folder!r} does not fit its config.json: {error}") from None


def from_hf(name: str, hf: LlamaConfig, read: Callable[[str], Tensor]) -> Tensor:
    """One of our whole weights out of HuggingFace's.

    Args:
        read: gives a HuggingFace tensor by its name.
    """
    if name in _PLAIN:
        return read(_PLAIN[name])
    number, _, rest = name.removeprefix(_LAYER).partition(".")
    prefix = f"model.layers.{number}."
    if rest in _PLAIN_IN_LAYER:
        return read(prefix + _PLAIN_IN_LAYER[rest])
    if rest == "mlp.linear_fc1.weight":
        return torch.cat([read(f"{prefix}mlp.gate_proj.weight"), read(f"{prefix}mlp.up_proj.weight")])
    assert rest == "self_attention.linear_qkv.weight", name
    groups = hf.num_key_value_heads
    parts = [read(f"{prefix}self_attn.{p}_proj.weight").unflatten(0, (groups, -1)) for p in "qkv"]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _files_by_tensor(folder: Path) -> Mapping[str, str]:
    """Tensor name -> safetensors file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return {name: str(folder / file) for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"model.language_model.path: {str(index)!r} is damaged ({error!r}).") from None
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ConfigError(
            f"model.language_model.path={str(folder)!r} holds no model.safetensors. Download the weights as "
            "safetensors, or set model.language_model.load_weights=false for random ones."
        )
    return dict.fromkeys(_open(str(single)).keys(), str(single))


def _open(file: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.language_model.path: {file!r} cannot be read ({error}). Download it again.") from None
