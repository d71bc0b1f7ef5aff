"""The operations between matrix products, against what torch derives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_anymal.model import compiled_ops

EPS = 1e-5


def norms(dtype: torch.dtype, trains: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of our norm and of torch's."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(7, 1, 24, generator=generator).to(dtype) for _ in range(2))
    weight = (1 + 0.1 * torch.randn(24, generator=generator)).to(dtype)
    results = []
    for norm in (compiled_ops.rms_norm, lambda x, w, eps: F.rms_norm(x, (24,), w, eps)):
        given = [x.clone().requires_grad_(), weight.clone().requires_grad_(trains)]
        output = norm(*given, EPS)
        results.append([output.detach(), *torch.autograd.grad(output, given[: 1 + trains], upstream)])
    return results[0], results[1]


@pytest.mark.parametrize("trains", [False, True])
def test_rms_norm(trains: bool) -> None:
    """The output is torch's bit for bit; gradients differ by rounding."""
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        ours, torchs = norms(dtype, trains)
        assert torch.equal(ours[0], torchs[0]), dtype
        for mine, other in zip(ours, torchs, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_rms_norm_in_lower_precision_is_as_exact_as_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(64, 24, generator=generator).bfloat16() for _ in range(2))
    weight = torch.ones(24, dtype=torch.bfloat16)

    def gradient(norm: object, dtype: torch.dtype) -> Tensor:
        given = x.to(dtype).requires_grad_()
        return torch.autograd.grad(norm(given, weight.to(dtype), EPS), given, upstream.to(dtype))[0]  # type: ignore[operator]

    def torchs(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (24,), weight, eps)

    exact = gradient(torchs, torch.float64)
    ours, theirs = (
        (gradient(norm, torch.bfloat16).double() - exact).abs().mean() for norm in (compiled_ops.rms_norm, torchs)
    )
    assert ours <= 1.05 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(9, heads, 8, generator=generator).to(dtype) for heads in (4, 2))
    angles = torch.randn(9, 1, 4, generator=generator).repeat(1, 1, 2)
    upstream = [torch.randn(x.shape, generator=generator).to(dtype) for x in (query, key)]
    results = []
    for rotate in (compiled_ops.apply_rotary, compiled_ops._rotate_both):
        given = [x.clone().requires_grad_() for x in (query, key)]
        outputs = rotate(*given, angles.cos(), angles.sin())
        results.append([*outputs, *torch.autograd.grad(outputs, given, upstream)])
    for mine, derived in zip(*results, strict=True):
        assert torch.equal(mine, derived)
