"""What is minimised, and how it is counted."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_mean(losses: Tensor, loss_mask: Tensor, batch_targets: int) -> Tensor:
    """A micro-batch's part of the batch's mean loss (AnyMAL eq. 1: the likelihood of the text given the media).

    Dividing by the targets of the whole global batch makes the sum over micro-batches and replicas the mean over
    target tokens, however the samples were packed.

    Args:
        losses, loss_mask: [1, T].
        batch_targets: target tokens of the global batch, counted over all processes.

    Returns:
        A scalar, fp32.
    """
    return (losses.float() * loss_mask).sum() / max(1, batch_targets)


def sums_by_group(losses: Tensor, loss_mask: Tensor, groups: Tensor, count: int) -> Tensor:
    """Loss and target tokens per group of tokens.

    Args:
        losses, loss_mask: [1, T].
        groups: [1, T] int64 in [0, count), or -1 for tokens of no group.

    Returns:
        [2, count] float64: sums of losses, numbers of targets.
    """
    known = (groups >= 0) & (loss_mask > 0)
    index = groups[known]
    sums = torch.zeros(2, count, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, index, losses.detach()[known].double())
    sums[1].index_add_(0, index, loss_mask[known].double())
    return sums
