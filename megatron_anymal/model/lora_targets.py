"""Which linear layers get a LoRA adapter; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from megatron_anymal.config import LoraConfig

# Linear layer of a megatron-core layer -> the HuggingFace projections that it fuses, in the order of its outputs.
PROJECTIONS = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}


def adapted_projections(layer: int, lora: LoraConfig) -> dict[str, tuple[str, ...]]:
    """Return which projections of a layer get an adapter, by their linear layer: {"qkv": ("q", "v"), "fc2": ...}."""
    adapted = {
        path.rpartition("_")[2]: tuple(
            short_name(name).removesuffix("_proj")
            for name in inside
            if is_target(f"layers.{layer}.{name}", lora.targets)
        )
        for path, inside in PROJECTIONS.items()
    }
    return {linear: names for linear, names in adapted.items() if names}


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether a projection, such as layers.3.self_attn.q_proj, matches one of the patterns of `model.lora.targets`."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(short_name(name), pattern) for pattern in targets)


def short_name(name: str) -> str:
    """Return the last part of a projection's name, such as q_proj."""
    return name.rpartition(".")[2]
