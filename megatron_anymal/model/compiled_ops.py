"""Operations between a layer's matrix products, each compiled to one kernel on a GPU by torch.compile.

On CPUs the same functions run eagerly.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_anymal import backend


def fused_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of tensors for calls whose first argument is a CUDA tensor."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(first: Tensor, *others: Any) -> Any:
        return (compiled() if first.is_cuda and can_compile() else function)(first, *others)

    return call


@functools.cache
def can_compile() -> bool:
    """Whether torch can generate GPU kernels, which requires Triton."""
    return importlib.util.find_spec("triton") is not None


@fused_on_gpu
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; uses NVIDIA apex if it is installed and torch cannot compile.

    Args:
        x: [..., d].
        weight: [d].

    Returns:
        [..., d].
    """
    if x.is_cuda and not can_compile() and backend.apex_kind() == "nvidia":
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        return fused_rms_norm_affine(x, weight, (x.size(-1),), eps)
    return _rms_norm(x, weight, eps)


@fused_on_gpu
def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the rotary embedding to each head, in the heads' dtype, like transformers' Llama.

    Args:
        query: [Q, n, d].
        key: [Q, g, d].
        cos: [Q, 1, d] fp32.
        sin: [Q, 1, d] fp32.

    Returns:
        The rotated query, [Q, n, d], and key, [Q, g, d].
    """

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)

    return turned(query), turned(key)
