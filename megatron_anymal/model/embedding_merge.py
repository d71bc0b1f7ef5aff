"""Merge soft tokens into the text embeddings, in place of their placeholder tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(text: Tensor, soft_tokens: Sequence[Tensor], token_indexes: Sequence[Tensor]) -> Tensor:
    """Insert soft tokens into a pack.

    A modality may have no soft tokens: its tensor then still takes part in the backward pass, with an empty gradient.
    So every trainable parameter of every rank can take part in every backward pass, in the same order: with gradients
    that are reduced while it runs, a text-only micro-batch, or a rank without media, neither stalls nor reorders the
    reductions, and contributes exactly zero.

    Args:
        text: [T, 1, H] embeddings of all token ids, including placeholders.
        soft_tokens: per modality [k, H].
        token_indexes: per modality [k]: position of each in the pack.

    Returns:
        [T, 1, H]; its gradient reaches the soft tokens and, at all other positions, the text embeddings.
    """
    if not soft_tokens:
        return text
    index = torch.cat(list(token_indexes))
    soft = torch.cat(list(soft_tokens)).to(text.dtype)
    assert len(index) == len(soft), f"{len(index)} placeholders, {len(soft)} soft tokens"
    return text.squeeze(1).index_copy(0, index, soft).unsqueeze(1)
