"""Operations between a layer's matrix products, each compiled to one kernel on a GPU by torch.compile.

On CPUs the same functions run eagerly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_anymal.dependencies.installed import apex_kind, is_importable


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
    return is_importable("triton")


@fused_on_gpu
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), weight, eps)


class _RmsNormOnCpu(torch.autograd.Function):
    """F.rms_norm with a backward pass of its own: torch's, derived from six operations, is slower on CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Optional[Tensor], None]:
        (gradient,) = gradients
        x, weight, scale = ctx.saved_tensors
        x, gradient = x.to(scale.dtype), gradient.to(scale.dtype)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * x * scale).flatten(0, -2).sum(0).to(weight.dtype)
        # y = w x s with s = (mean(x^2) + eps)^(-1/2): dL/dx = s (w g - x s^2 mean(w g x)).
        weighted = gradient * weight
        mean = (weighted * x).mean(-1, keepdim=True)
        return weighted.mul_(scale).addcmul_(x, mean * scale.pow(3), value=-1).to(weight.dtype), of_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; uses NVIDIA apex if it is installed and torch cannot compile.

    Args:
        x: [..., d].
        weight: [d].

    Returns:
        [..., d].
    """
    if x.is_cuda and not can_compile() and apex_kind() == "nvidia":
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        return fused_rms_norm_affine(x, weight, (x.size(-1),), eps)
    if not x.is_cuda:
        return _RmsNormOnCpu.apply(x, weight, eps)
    return _rms_norm(x, weight, eps)


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
    if query.is_cuda:
        return _rotate_both(query, key, cos, sin)
    return _RotaryOnCpu.apply(query, cos, sin), _RotaryOnCpu.apply(key, cos, sin)


@fused_on_gpu
def _rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class _RotaryOnCpu(torch.autograd.Function):
    """A rotation whose backward pass is the rotation back, half of the operations that torch would derive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, -sin), None, None
