"""The merge: soft tokens take the places of their placeholders among the text embeddings."""

from __future__ import annotations

from typing import Any, Iterable, Sequence

import torch
from torch import Tensor, nn


def merge(text: Tensor, soft_tokens: Sequence[Tensor], token_indexes: Sequence[Tensor]) -> Tensor:
    """Put soft tokens into a pack.

    Args:
        text: [T, 1, H] embeddings of all token ids, placeholders among them.
        soft_tokens: per modality [k, H].
        token_indexes: per modality [k]: where in the pack each goes.

    Returns:
        [T, 1, H]; its gradient reaches the soft tokens, and the text embeddings everywhere else.
    """
    if not soft_tokens:
        return text
    index = torch.cat(list(token_indexes))
    soft = torch.cat(list(soft_tokens)).to(text.dtype)
    assert len(index) == len(soft), f"{len(index)} placeholders, {len(soft)} soft tokens"
    return text.squeeze(1).index_copy(0, index, soft).unsqueeze(1)


def reach(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`x`, unchanged, with a zero gradient for parameters that this micro-batch does not use.

    Every trainable parameter of every rank then takes part in every backward pass: a text-only micro-batch, or a rank
    without media, leaves no gradient reduction waiting, and adds exactly nothing.
    """
    return _Reach.apply(x, *parameters)  # type: ignore[no-untyped-call]


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (*gradients, *(torch.zeros_like(p) for p in ctx.saved_tensors))
