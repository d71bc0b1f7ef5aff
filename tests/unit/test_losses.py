"""Losses by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_anymal.losses import batch_mean, sums_by_group

LOSSES = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
MASK = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])


def test_batch_mean_divides_by_the_targets_of_the_whole_batch() -> None:
    assert batch_mean(LOSSES, MASK, 10).item() == pytest.approx(1.3)
    assert batch_mean(LOSSES, torch.zeros(1, 5), 0).item() == 0.0


def test_parts_of_a_batch_add_up_to_its_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    losses, mask = torch.rand(1, 60, generator=generator), torch.rand(1, 60, generator=generator).round()
    parts = [batch_mean(x, m, int(mask.sum())) for x, m in zip(losses.split([7, 1, 52], 1), mask.split([7, 1, 52], 1))]
    torch.testing.assert_close(sum(parts), losses[mask > 0].mean())


def test_batch_mean_is_fp32_and_its_gradient_is_the_mask_over_the_targets() -> None:
    losses = LOSSES.bfloat16().requires_grad_()
    loss = batch_mean(losses, MASK, 4)
    assert loss.dtype == torch.float32
    loss.backward()
    assert losses.grad is not None and losses.grad.tolist() == [[0.25, 0.0, 0.25, 0.25, 0.0]]


def test_sums_by_group() -> None:
    # Group 2 has only a masked token, -1 is of no group.
    sums = sums_by_group(LOSSES, MASK, torch.tensor([[0, 0, 1, -1, 2]]), 4)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [[1.0, 4.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    assert sums_by_group(LOSSES, MASK, torch.tensor([[3, 3, 3, 3, 3]]), 4)[:, 3].tolist() == [13.0, 3.0]


def test_sums_by_group_add_up_beyond_fp32() -> None:
    losses = torch.full((1, 1000), 16777216.0)
    losses[0, 1:] = 1.0
    sums = sums_by_group(losses, torch.ones(1, 1000), torch.zeros(1, 1000, dtype=torch.int64), 1)
    assert sums[0, 0].item() == 16777216 + 999
