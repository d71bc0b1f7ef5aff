"""Functions compiled with torch.compile match the same functions without compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_anymal.model import compiled_ops
from megatron_anymal.model.attention import rotation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(not compiled_ops.can_compile(), reason="torch.compile needs Triton"),
]


def compare(function: Callable[..., Any], written: Callable[..., Any], *given: torch.Tensor) -> None:
    """Compare outputs and gradients of both functions by norm, because bf16 rounding differs."""
    results = []
    for one in (function, written):
        inputs = [x.clone().requires_grad_(x.dtype == torch.bfloat16) for x in given]
        output = one(*inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        sum(out.float().square().sum() for out in outputs).backward()
        results.append([*outputs, *(x.grad for x in inputs if x.grad is not None)])
    assert len(results[0]) == len(results[1]) > 1
    for mine, theirs in zip(*results):
        assert float((mine - theirs).float().norm() / theirs.float().norm()) < 1e-2


# Lengths differ between steps. From the second one on, torch uses a kernel with dynamic shapes.
@pytest.mark.parametrize("tokens", [512, 776, 1024])
def test_rotary_embedding(tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    query, key = (torch.randn(tokens, n, 128, generator=generator, device="cuda", dtype=torch.bfloat16) for n in (8, 2))
    turn = rotation(torch.arange(tokens, device="cuda"), 1e4 ** (-torch.arange(0, 128, 2) / 128))
    written: Any = compiled_ops._rotate_both
    compare(compiled_ops.apply_rotary, written.__wrapped__, query, key, *turn)


@pytest.mark.parametrize("tokens", [512, 776, 1024])
def test_rms_norm(tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, 1, 4096, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(4096, generator=generator, device="cuda", dtype=torch.bfloat16)
    compare(
        lambda *given: compiled_ops.rms_norm(*given, 1e-5),
        lambda *given: torch.nn.functional.rms_norm(given[0], (4096,), given[1], 1e-5),
        x,
        weight,
    )
