"""A frozen base model held only in FP8: Transformer Engine's quantized weights, without a bf16 copy.

They take one byte per element. The input gradient of a linear layer needs the transposed weight; on Hopper that is a
second copy, created on demand and dropped right after, so that only one layer has it at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_anymal.model.quantized_weights import is_fp8


def building(transformer: TransformerConfig) -> AbstractContextManager[Any]:
    """Context manager for building a model.

    With gradients enabled, Transformer Engine would keep the unquantized initial values, and a transposed copy of every
    weight from the start.
    """
    return torch.no_grad() if transformer.fp8_param else nullcontext()


def drop_transposes(model: nn.Module) -> None:
    """Free each quantized weight's transposed copy after the backward pass of its linear layer."""
    for module in model.modules():
        held = [p for p in module.parameters(recurse=False) if is_fp8(p)]
        if held:
            module.register_full_backward_hook(_Drop(held))


class _Drop:
    def __init__(self, held: Iterable[Any]):
        self._held = tuple(held)

    def __call__(self, module: nn.Module, *gradients: Any) -> None:
        for parameter in self._held:
            parameter.update_usage(rowwise_usage=True, columnwise_usage=False)
