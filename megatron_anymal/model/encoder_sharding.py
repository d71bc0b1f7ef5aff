"""Share the encoder work among the ranks of a replica's first pipeline stage.

Each media piece is encoded by one rank. The tensor-parallel ranks gather features before the projector, whose weights
they share; the context-parallel ranks gather soft tokens after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


def gather_features(mine: Tensor, shares: Sequence[int]) -> Tensor:
    """Gather the features of all tensor-parallel ranks.

    The projector's backward pass gives every rank the whole gradient, of which each takes its own slice. The slice is
    scaled by the number of ranks, because megatron-core averages the encoder's gradients over them
    (`share_gradients`).

    Args:
        mine: [shares[rank], F, w].

    Returns:
        [sum(shares), F, w].
    """
    return _GatherFeatures.apply(mine, tuple(shares))


def share_gradients(encoder: torch.nn.Module) -> None:
    """Make megatron-core average a trainable encoder's gradients over the tensor-parallel ranks."""
    parameter: Any
    for parameter in encoder.parameters():
        parameter.average_gradients_across_tp_domain = True


def gather_soft_tokens(mine: Tensor, shares: Sequence[int]) -> Tensor:
    """Gather the soft tokens of all context-parallel ranks; the backward pass sums the gradients of all ranks and
    scatters them.

    Args:
        mine: [shares[rank], k, H].

    Returns:
        [sum(shares), k, H].
    """
    longest = max(shares)
    padded = torch.cat([mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])])
    everything = gather_from_sequence_parallel_region(padded, group=parallel_state.get_context_parallel_group())
    return torch.cat([chunk[:share] for chunk, share in zip(everything.split(longest), shares)])


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, shares: tuple[int, ...]) -> Tensor:
        ctx.shares = shares
        padded = mine.new_zeros(max(shares), *mine.shape[1:])
        padded[: len(mine)] = mine
        gathered = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(gathered, padded, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat([part[:share] for part, share in zip(gathered, shares)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rank = parallel_state.get_tensor_model_parallel_rank()
        first = sum(ctx.shares[:rank])
        mine = gradients[0][first : first + ctx.shares[rank]]
        return mine * len(ctx.shares), None
