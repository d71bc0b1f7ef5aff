"""TEST ONLY: Transformer Engine's own classes on a CPU, in a process that has the CPU shim.

Its compiled functions that these tests reach are written in torch: casts to and from FP8, the transposed copy, matrix
products, norms, and attention over documents. It sees a Hopper as the GPU. Everything else is its own: modules,
their autograd functions, tensors, quantizers, recipes, and the signatures of all that is called. Rounding is that of
torch's casts, not of a GPU's kernels.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_anymal.dependencies.installed import has_transformer_engine_extension

# Marks of a test module.
MARKS = [
    pytest.mark.te,
    pytest.mark.skipif(
        not has_transformer_engine_extension(), reason="Transformer Engine with its torch extension is not installed"
    ),
]


def install() -> None:
    """Enable this process, a rank of a test, to build Transformer Engine's modules and quantize on the CPU."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch as compiled
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    # Delayed scaling's update has a version in Python.
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"
    loaded = [m for name, m in list(sys.modules.items()) if name.startswith("transformer_engine")]
    for name, function in _COMPILED.items():
        original = getattr(compiled, name)
        for module in loaded:
            if getattr(module, name, None) is original:
                setattr(module, name, function)
    base: Any = TransformerEngineBaseModule
    base.__init__, base.prepare_forward = _built(base.__init__), _prepared(base.prepare_forward)
    te.DotProductAttention.forward = _attend


def _built(initialize: Any) -> Any:
    """A module's `__init__`, to which a CUDA device seems available."""

    @functools.wraps(initialize)
    def call(*args: Any, **kwargs: Any) -> None:
        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            initialize(*args, **kwargs)

    return call


def _prepared(prepare: Any) -> Any:
    """A module's `prepare_forward`, to which the input seems to be on a CUDA device."""

    @contextmanager
    def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            with mock.patch.object(Tensor, "is_cuda", True):
                given = stack.enter_context(prepare(*args, **kwargs))
            yield given

    return call


def _fp8(kind: Any) -> torch.dtype:
    return {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}[kind.name]


def _quantize(source: Tensor, quantizer: Any, target: Any = None, skip: Any = None) -> Any:
    """[...] -> a Float8Tensor of that shape, by the quantizer's scale (delayed) or the largest value (current)."""
    if target is None:
        target = quantizer.make_empty(source.shape, dtype=source.dtype, device=source.device)
    kind = _fp8(quantizer.dtype)
    largest = source.detach().abs().max().float()
    if type(quantizer).__name__ == "Float8Quantizer":
        scale = quantizer.scale
        quantizer.amax.copy_(largest)
    else:
        scale = torch.where(largest > 0, torch.finfo(kind).max / largest, 1.0)
    limit = torch.finfo(kind).max
    target._data.copy_((source.detach().float() * scale).clamp(-limit, limit).to(kind).view(torch.uint8))
    target._scale_inv.copy_((1 / scale).reshape(1))
    if quantizer.columnwise_usage:
        target._create_transpose()
    else:
        target._transpose, target._transpose_invalid = None, True
    return target


def _dequantize(tensor: Any, dtype: Any) -> Tensor:
    """A Float8Tensor [...] -> its values, [...] of the type."""
    return (tensor._data.view(_fp8(tensor._fp8_dtype)).float() * tensor._scale_inv).to(_WIDE[dtype.name])


def _transpose(data: Tensor, dtype: Any, *, out: Any = None) -> Tensor:
    """[rows, columns] -> [columns, rows]."""
    flat = data.reshape(-1, data.size(-1)).t().contiguous()
    return flat if out is None else out.copy_(flat)


def _values(tensor: Any, transposed: bool) -> Tensor:
    """Operand [rows, columns] of a matrix product, in fp32. A Hopper reads an FP8 operand only by its long side: the
    other layout needs the transposed copy."""
    if not hasattr(tensor, "update_usage"):
        return tensor.flatten(0, -2).float()
    if transposed:
        assert tensor._transpose is not None and not tensor._transpose_invalid, "there is no transposed copy"
        return (tensor._transpose.view(_fp8(tensor._fp8_dtype)).float() * tensor._scale_inv).t()
    assert tensor._data is not None, "there are no FP8 values"
    return (tensor._data.view(_fp8(tensor._fp8_dtype)).float() * tensor._scale_inv).flatten(0, -2)


def _product(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Any,
    quantizer: Any,
    dtype: Any,
    bias: Any,
    bias_dtype: Any,
    gelu: bool,
    gelu_input: Any,
    grad: bool,
    *workspace: Any,
    **overlap: Any,
) -> tuple[Any, Any, Any, Any]:
    """b [n, k] a [k, m] -> [n, m], each optionally transposed; with `grad` also the sum of b's rows."""
    assert out is None and quantizer is None and not gelu
    left, right = _values(b, transpose_b), _values(a, not transpose_a)
    result = (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)
    if bias is not None and not grad:
        result = result + bias.float()
    shape = result.shape if transpose_b else (*b.shape[:-1], result.size(-1))
    target = _WIDE[dtype.name] if dtype is not None else b.dtype
    summed = left.sum(0).to(bias.dtype) if bias is not None and grad else None
    return result.view(shape).to(target), summed, None, None


def _quantized_or(out: Tensor, quantizer: Any) -> Any:
    return out if quantizer is None else quantizer(out)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, *settings: Any) -> tuple[Any, Any, Any]:
    """[tokens, hidden] -> the same, None, reciprocal root mean square [tokens]."""
    inverse = (x.float().square().mean(-1) + eps).rsqrt()
    result = (x.float() * inverse[:, None] * weight.float()).to(x.dtype)
    return _quantized_or(result, quantizer), None, inverse


def _rms_norm_backward(
    gradient: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    normalized = x.float() * inverse[:, None]
    scaled = gradient.float() * weight.float()
    of_x = inverse[:, None] * (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True))
    return of_x.to(x.dtype), (gradient.float() * normalized).sum(0).to(weight.dtype)


def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Any, quantizer: Any, *settings: Any
) -> tuple[Any, Tensor, Tensor]:
    """[tokens, hidden] -> the same, mean and reciprocal deviation [tokens]."""
    mean = x.float().mean(-1)
    inverse = (x.float().var(-1, unbiased=False) + eps).rsqrt()
    result = (x.float() - mean[:, None]) * inverse[:, None] * weight.float() + bias.float()
    return _quantized_or(result.to(x.dtype), quantizer), mean, inverse


def _layer_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    normalized = (x.float() - mean[:, None]) * inverse[:, None]
    scaled = gradient.float() * weight.float()
    centered = scaled - scaled.mean(-1, keepdim=True)
    of_x = inverse[:, None] * (centered - normalized * (scaled * normalized).mean(-1, keepdim=True))
    of_weight = (gradient.float() * normalized).sum(0)
    return of_x.to(x.dtype), of_weight.to(weight.dtype), gradient.float().sum(0).to(weight.dtype)


def _attend(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    qkv_format: str = "",
    attn_mask_type: str = "",
    **sizes: Any,
) -> Tensor:
    """Causal attention within documents: query [Q, n, d], key and value [Q, g, d] -> [Q, n * d]."""
    settings = (qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type)
    assert settings == ("thd", "padding_causal") and torch.equal(cu_seqlens_q, cu_seqlens_kv)
    documents = []
    for first, last in cu_seqlens_q.unfold(0, 2, 1).tolist():
        parts = (x[first:last].transpose(0, 1) for x in (query, key, value))
        documents.append(F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(documents).flatten(1)


_WIDE = {"kFloat32": torch.float32, "kBFloat16": torch.bfloat16, "kFloat16": torch.float16}
_COMPILED = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "fp8_transpose": _transpose,
    "generic_gemm": _product,
    "rmsnorm_fwd": _rms_norm,
    "rmsnorm_bwd": _rms_norm_backward,
    "layernorm_fwd": _layer_norm,
    "layernorm_bwd": _layer_norm_backward,
}
