"""A small Llama whose rows consist of whole NF4 blocks, shared by tests of a base in NF4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_anymal.dependencies.installed import is_importable

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    not is_importable("bitsandbytes"), reason="needs bitsandbytes: pip install -e '.[nf4]'"
)
# Two tensor-parallel ranks split rows of 128 and 256 elements between blocks of 64.
SHAPE: dict[str, Any] = {**LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_llama(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Save a random Llama in HuggingFace's format."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).save_pretrained(folder)
    return str(folder)


def rounded_to_nf4(weight: Tensor) -> Tensor:
    """A weight [out, in] after bitsandbytes' own linear layer has quantized and dequantized it."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    held = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    assert held.bnb_quantized and held.quant_state.blocksize == 64
    values: Tensor = dequantize_4bit(held.data, held.quant_state)
    assert values.dtype == weight.dtype
    return values


def make_rounded_llama(source: str, folder: Path) -> str:
    """Save a Llama whose projections have the values that NF4 gives them, in the folder's own dtype."""
    model = LlamaForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in PROJECTIONS:
                parameter.copy_(rounded_to_nf4(parameter.data))
    model.save_pretrained(folder)
    return str(folder)
