"""A frozen base model held only in FP8: Transformer Engine's quantized weights, without a bf16 copy.

They take one byte per element. The input gradient of a linear layer needs the transposed weight; on Hopper that is a
second copy, created on demand and dropped right after, so that only one layer has it at a time.

Hashes are computed from the values before quantization, so a run in FP8 and one in bf16 have the same base hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_anymal.config import ModelConfig


def is_quantized(parameter: Any) -> bool:
    """Whether a parameter is one of Transformer Engine's quantized tensors."""
    return hasattr(parameter, "update_usage")


def unquantized(tensor: Any) -> Tensor:
    """A tensor's values, [...] of its shape: those of a quantized tensor in its nominal dtype, any other itself."""
    return tensor.dequantize() if is_quantized(tensor) else tensor


def stored_tensors(tensor: Any) -> list[Tensor]:
    """The tensors that hold a tensor's bytes: itself, or a quantized tensor's FP8 values, transposed copy and scale.

    A quantized tensor's own storage has no memory, whatever its `nbytes` and `data_ptr` say.

    Returns:
        Of any shapes [...].
    """
    if not is_quantized(tensor):
        return [tensor]
    return [part for part in tensor.get_metadata().values() if isinstance(part, Tensor)]


def leave_out_fp8(model: ModelConfig) -> None:
    """Change a run's section for answers and exports: they come from the unquantized base, whether or not the training
    computed in FP8, also on a machine without Transformer Engine.
    """
    model.fp8, model.fp8_recipe, model.fp8_primary_weights = "", "tensorwise", False
    if model.transformer_impl == "transformer_engine":
        model.transformer_impl = "auto"


def building(transformer: TransformerConfig) -> AbstractContextManager[Any]:
    """Context manager for building a model.

    With gradients enabled, Transformer Engine would keep the unquantized initial values, and a transposed copy of every
    weight from the start.
    """
    return torch.no_grad() if transformer.fp8_param else nullcontext()


def drop_transposes(model: nn.Module) -> None:
    """Free each quantized weight's transposed copy after the backward pass of its linear layer."""
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


def remember_source(parameter: Any, digest: Callable[[], str]) -> None:
    """Record the hash of the weight that a quantized parameter's current values were quantized from.

    Args:
        digest: returns `unsharded_weights.hash_weight` of the whole unquantized weight; called once, if it is asked
            for.
    """
    parameter.source = cache(digest), _checksum(parameter)


def source_of(parameter: Any) -> str:
    """Return the hash recorded by `remember_source`, or a different string if the parameter has changed since."""
    digest, checksum = parameter.source
    return digest() if _checksum(parameter) == checksum else f"changed since {digest()}"


def _checksum(parameter: Any, chunk: int = 1 << 24) -> int:
    """Sum the quantized bytes, each with an odd factor of its own, on their device."""
    stored: Tensor = parameter.get_data_tensors(rowwise_data=True, columnwise_data=False).detach().flatten()
    total = torch.zeros((), dtype=torch.int64, device=stored.device)
    for first in range(0, stored.numel(), chunk):
        part = stored[first : first + chunk].view(torch.uint8).long()
        positions = torch.arange(first, first + part.numel(), device=part.device)
        total += (part * (2 * positions + 1)).sum()
    return int(total)
