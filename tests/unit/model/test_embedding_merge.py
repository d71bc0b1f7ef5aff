"""Soft tokens are merged at their positions, and gradients reach the right tensors."""

from __future__ import annotations

import pytest
import torch

from megatron_anymal.model.embedding_merge import merge


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def test_soft_tokens_go_to_their_places() -> None:
    text, image, sound = leaf(7, 1, 3), leaf(3, 3), leaf(1, 3)
    merged = merge(text, [image, sound], [torch.tensor([4, 1, 5]), torch.tensor([2])])
    expected = text.detach().clone()
    for position, row in zip((4, 1, 5, 2), [*image.detach(), *sound.detach()]):
        expected[position, 0] = row
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


def test_a_modality_without_soft_tokens_still_gets_its_gradient_of_nothing() -> None:
    text, image, weight = leaf(4, 1, 3), leaf(2, 3), leaf(3, 3)
    idle = (torch.zeros(1, 3) @ weight)[:0]
    merged = merge(text, [idle, image], [torch.empty(0, dtype=torch.int64), torch.tensor([0, 2])])
    merged.backward(torch.ones(4, 1, 3))
    assert weight.grad is not None and not weight.grad.any()
    torch.testing.assert_close(image.grad, torch.ones(2, 3))


def test_only_modalities_without_soft_tokens() -> None:
    weight = leaf(3, 3)
    # With a frozen Llama, the text embeddings need no gradient.
    text = torch.randn(4, 1, 3)
    merged = merge(text, [(torch.zeros(1, 3) @ weight)[:0]], [torch.empty(0, dtype=torch.int64)])
    torch.testing.assert_close(merged, text)
    merged.sum().backward()
    assert weight.grad is not None and not weight.grad.any()
