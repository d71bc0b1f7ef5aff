"""A frozen base that is held in FP8 alone: Transformer Engine's quantized weights, without a bf16 copy.

They take one byte a number. The gradient of a linear's input needs the weight transposed; on Hopper that is a second
copy, made when it is needed and dropped right after, so that one layer has it at a time.

Hashes are those of the values that were quantized, so that a run in FP8 and one in bf16 stand on the same base.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def is_quantized(parameter: Any) -> bool:
    """Whether a parameter is one of Transformer Engine's quantized tensors."""
    return hasattr(parameter, "update_usage")


def building(transformer: TransformerConfig) -> AbstractContextManager[Any]:
    """What a model is built under.

    With gradients on, Transformer Engine would keep the unquantized initial values, and a transposed copy of every
    weight from the start.
    """
    return torch.no_grad() if transformer.fp8_param else nullcontext()


def drop_transposes(model: nn.Module) -> None:
    """Free each quantized weight's transposed copy after the backward pass of its linear."""
    for module in model.modules():
        held = [p for p in module.parameters(recurse=False) if is_quantized(p)]
        if held:
            module.register_full_backward_hook(_Drop(held))


class _Drop:
    def __init__(self, held: Iterable[Any]):
        self._held = tuple(held)

    def __call__(self, module: nn.Module, *gradients: Any) -> None:
        for parameter in self._held:
            parameter.update_usage(rowwise_usage=True, columnwise_usage=False)


def remember_source(parameter: Any, digest: str) -> None:
    """Note what a quantized parameter's present values were made from.

    Args:
        digest: `weights.hash_weight` of the whole unquantized weight.
    """
    parameter.source = digest, _checksum(parameter)


def source_of(parameter: Any) -> str:
    """The hash noted by `remember_source`; another one where the parameter was changed since."""
    digest, checksum = parameter.source
    return digest if _checksum(parameter) == checksum else f"changed since {digest}"


def _checksum(parameter: Any, chunk: int = 1 << 24) -> int:
    """A sum over the quantized bytes in which each place has its own odd factor; on their device."""
    stored: Tensor = parameter.get_data_tensors(rowwise_data=True, columnwise_data=False).detach().flatten()
    total = torch.zeros((), dtype=torch.int64, device=stored.device)
    for first in range(0, stored.numel(), chunk):
        part = stored[first : first + chunk].view(torch.uint8).long()
        places = torch.arange(first, first + part.numel(), device=part.device)
        total += (part * (2 * places + 1)).sum()
    return int(total)
