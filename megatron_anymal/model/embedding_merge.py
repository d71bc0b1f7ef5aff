"""The merge: soft tokens take the places of their placeholders among the text embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(text: Tensor, soft_tokens: Sequence[Tensor], token_indexes: Sequence[Tensor]) -> Tensor:
    """Put soft tokens into a pack.

    A modality may come with none of them: its tensor then still takes part in the backward pass, with a gradient of
    no rows. So every trainable parameter of every rank takes part in every backward pass, in the same order: a
    text-only micro-batch, or a rank without media, leaves no gradient reduction waiting, mixes none up, and adds
    exactly nothing.

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
