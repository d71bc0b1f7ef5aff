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


def gather_soft_tokens(mine: Sequence[Tensor], shares: Sequence[Sequence[int]]) -> list[Tensor]:
    """Gather the soft tokens of all context-parallel ranks, those of all modalities at once; the backward pass sums the
    gradients of all ranks and scatters them.

    Args:
        mine: for each modality [own share, k, H]; k differs, H does not.
        shares: for each modality the shares of all ranks, in their order.

    Returns:
        For each modality [sum of the shares, k, H].
    """
    padded = [torch.cat([x, x.new_zeros(max(of) - len(x), *x.shape[1:])]) for x, of in zip(mine, shares)]
    flat = torch.cat([x.flatten(0, 1) for x in padded])
    everything = gather_from_sequence_parallel_region(flat, group=parallel_state.get_context_parallel_group())
    # By rank, then by modality.
    chunks = [chunk.split([x.size(0) * x.size(1) for x in padded]) for chunk in everything.split(len(flat))]
    return [
        torch.cat([chunk[number].view_as(x)[:share] for chunk, share in zip(chunks, shares[number])])
        for number, x in enumerate(padded)
    ]


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
