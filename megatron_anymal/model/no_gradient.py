"""A stage's output whose backward pass is known to be zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def without_gradient(output: Tensor, given: Tensor) -> Tensor:
    """The output of a stage, which hands zeros to what it was given in place of a backward pass.

    What lies before still takes part: pipelines send gradients backwards whatever they are, and gradient buckets become
    ready in one order on every rank.

    Args:
        output: computed from `given`, without a graph.
    """
    return _ZeroGradient.apply(output, given)


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, given: Tensor) -> Tensor:
        ctx.given = given.shape, given.dtype, given.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        shape, dtype, device = ctx.given
        return None, torch.zeros(shape, dtype=dtype, device=device)
