"""Rotary position embeddings (RoPE) of packed documents: positions restart with each document.

The angles are worked out once per pass; every layer's core attention turns its queries and keys by them, whichever
kernel follows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """What turns the tokens that a rank holds: [Q, 1, d] each, fp32, the second half of d repeating the first."""

    cos: Tensor
    sin: Tensor


def rotation(position_ids: Tensor, inv_freq: Tensor) -> Rotation:
    """The rotation of tokens by their places in their documents.

    Args:
        position_ids: [Q] int64.
        inv_freq: [d / 2], as transformers' LlamaRotaryEmbedding gives it (RoPE scaling included).
    """
    angles = torch.outer(position_ids.to(inv_freq.dtype), inv_freq.to(position_ids.device))
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return Rotation(angles.cos(), angles.sin())
