"""What the trainer needs to know of a weight that is held in fewer bits than it is computed with: FP8 or NF4.

Hashes are computed from the values before quantization, so runs with the same base have the same base hash, whatever
format it is held in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_anymal.config import ModelConfig
from megatron_anymal.model.nf4_weights import NF4Weight


def is_quantized(parameter: Any) -> bool:
    """Whether a parameter is held in NF4, or is one of Transformer Engine's quantized tensors."""
    return isinstance(parameter, NF4Weight) or is_fp8(parameter)


def is_fp8(parameter: Any) -> bool:
    """Whether a parameter is one of Transformer Engine's quantized tensors."""
    return hasattr(parameter, "update_usage")


def unquantized(tensor: Any) -> Tensor:
    """A tensor's values, [...] of its shape: those of a quantized tensor in its nominal dtype, any other itself."""
    return tensor.dequantize() if is_quantized(tensor) else tensor


def stored_tensors(tensor: Any) -> list[Tensor]:
    """The tensors that hold a tensor's bytes: itself, an NF4 weight's packed values and scales, or a Transformer Engine
    tensor's FP8 values, transposed copy and scale.

    A quantized tensor's own storage has no memory, whatever its `nbytes` and `data_ptr` say.

    Returns:
        Of any shapes [...].
    """
    if isinstance(tensor, NF4Weight):
        return [tensor.packed, tensor.scales]
    if not is_fp8(tensor):
        return [tensor]
    return [part for part in tensor.get_metadata().values() if isinstance(part, Tensor)]


def leave_out_quantization(model: ModelConfig) -> None:
    """Change a run's section for answers and exports: they come from the unquantized base, whatever the training held
    and computed with, also on a machine without Transformer Engine or bitsandbytes.
    """
    model.fp8, model.fp8_recipe, model.fp8_primary_weights = "", "tensorwise", False
    model.fp4 = model.base_quantization = ""
    if model.transformer_impl == "transformer_engine":
        model.transformer_impl = "auto"


@dataclass(frozen=True)
class _Source:
    """The whole unquantized weight that a parameter's values were made from; see `remember_source`."""

    read: Callable[[], Tensor]
    digest: Callable[[], str]
    # Of the quantized values.
    checksum: int


def remember_source(parameter: Any, read: Callable[[], Tensor], digest: Callable[[], str]) -> None:
    """Record what a quantized parameter's current values were quantized from.

    Args:
        read: reads the whole unquantized weight, of any shape [...], in the parameter's dtype.
        digest: returns `unsharded_weights.hash_weight` of it; called once, if it is asked for.
    """
    parameter.source = _Source(read, cache(digest), _checksum(parameter))


def source_hash(parameter: Any) -> str:
    """Return the hash recorded by `remember_source`, or a different string if the parameter has changed since."""
    source: _Source = parameter.source
    digest = source.digest()
    return digest if _checksum(parameter) == source.checksum else f"changed since {digest}"


def read_source(parameter: Any) -> Tensor:
    """Read the whole unquantized weight, of any shape [...], that a quantized parameter was made from.

    Raises:
        ConfigError, CheckpointError, TensorFileError, OSError: it cannot be read any more.
    """
    source: _Source = parameter.source
    return source.read()


def _checksum(parameter: Any, chunk: int = 1 << 24) -> int:
    """Sum the quantized bytes, each with an odd factor of its own, on their device."""
    if isinstance(parameter, NF4Weight):
        parts = stored_tensors(parameter)
    else:
        # The transposed copy comes and goes.
        parts = [parameter.get_data_tensors(rowwise_data=True, columnwise_data=False)]
    before, sums = 0, []
    for part in parts:
        stored = part.detach().flatten().view(torch.uint8)
        for first in range(0, stored.numel(), chunk):
            some = stored[first : first + chunk].long()
            positions = torch.arange(before + first, before + first + some.numel(), device=some.device)
            sums.append((some * (2 * positions + 1)).sum())
        before += stored.numel()
    return sum(int(one) for one in sums)
