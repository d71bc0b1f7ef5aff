"""Floating-point operations of a step on a CPU, as torch counts them, with attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def counted_flops(step: Callable[[int], Any]) -> int:
    """Floating-point operations of a step, two per multiply-add, as torch counts them, with attention: causal attention
    without a mask computes half of each square."""
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        step(0)
    return int(sum(counter.get_flop_counts()["Global"].values()))


def _attention_flops(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> int:
    """Scores and sums of values of [rows, heads, tokens, channels]."""
    rows, heads, queries, channels = query
    return 4 * rows * heads * queries * key[2] * channels // (2 if is_causal else 1)


def _attention_backward_flops(
    gradient: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    output: Sequence[int],
    sums: Sequence[int],
    dropout_p: float,
    is_causal: bool,
    **others: Any,
) -> int:
    """Two and a half times as many: the scores are computed again."""
    return 5 * _attention_flops(query, key, value, is_causal=is_causal) // 2
