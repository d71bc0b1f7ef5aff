"""Soft tokens take their places, and gradients go where they should."""

from __future__ import annotations

import pytest
import torch

from megatron_anymal.model.merge import attach, merge


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def test_soft_tokens_go_to_their_places() -> None:
    text, image, sound = leaf(7, 1, 3), leaf(3, 3), leaf(1, 3)
    merged = merge(text, [image, sound], [torch.tensor([4, 1, 5]), torch.tensor([2])])
    expected = text.detach().clone()
    for place, row in zip((4, 1, 5, 2), [*image.detach(), *sound.detach()]):
        expected[place, 0] = row
    torch.testing.assert_close(merged.detach(), expected)
    direction = torch.randn(7, 1, 3)
    merged.backward(direction)
    torch.testing.assert_close(image.grad, direction[[4, 1, 5], 0])
    torch.testing.assert_close(sound.grad, direction[[2], 0])
    assert text.grad is not None
    torch.testing.assert_close(text.grad[[0, 3, 6]], direction[[0, 3, 6]])
    assert not text.grad[[1, 2, 4, 5]].any()


def test_soft_tokens_take_the_texts_type() -> None:
    merged = merge(torch.zeros(2, 1, 3, dtype=torch.bfloat16), [torch.ones(1, 3)], [torch.tensor([1])])
    assert merged.dtype == torch.bfloat16 and merged[1].eq(1).all() and merged[0].eq(0).all()


def test_nothing_to_merge() -> None:
    text = leaf(4, 1, 3)
    assert merge(text, [], []) is text


def test_counts_that_differ_are_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="2 placeholders, 1 soft tokens"):
        merge(torch.zeros(3, 1, 2), [torch.zeros(1, 2)], [torch.tensor([0, 1])])


def test_attached_tensors_get_zeros() -> None:
    x, one, two = leaf(4, 1, 3), leaf(2, 3), leaf(5)
    out = attach(x, [one, two * 2])
    torch.testing.assert_close(out, x)
    direction = torch.randn(4, 1, 3)
    out.backward(direction)
    torch.testing.assert_close(x.grad, direction)
    for idle in (one, two):
        assert idle.grad is not None and not idle.grad.any()


def test_attached_tensors_may_be_broken_numbers() -> None:
    # Multiplying by 0 instead would send NaN into the loss and the gradients.
    x, idle = leaf(2, 1, 3), torch.full((1, 3), float("nan"), requires_grad=True)
    attach(x, [idle]).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert idle.grad is not None and not idle.grad.any()


def test_attached_under_no_gradient_and_to_a_frozen_base() -> None:
    x, idle = torch.randn(2, 1, 3), leaf(1, 3)
    assert attach(x, []) is x
    with torch.no_grad():
        torch.testing.assert_close(attach(x, [idle]), x)
    out = attach(x, [idle])
    assert out.requires_grad
    out.sum().backward()
    assert idle.grad is not None and not idle.grad.any()
