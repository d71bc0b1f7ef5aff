"""Choice of the next token, shared by checkpoints and exported folders so that both give the same answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_anymal.data.global_order import mix64
from megatron_anymal.generation.running_batch import RunningPrompt
from megatron_anymal.generation.sampling import Sampling


def choose_each(logits: Tensor, running: Sequence[RunningPrompt]) -> list[int]:
    """Choose the next token of several answers, each as `choose` does, among those that its guide allows.

    Args:
        logits: [R, V] float32; changed in place.
        running: the answers.
    """
    settings = [one.sampling for one in running]
    for row, one in enumerate(running):
        if one.answer.guide:
            logits[row] = one.answer.guide.masked(logits[row])
            settings[row] = one.answer.guide.sampling
    # One synchronization with the GPU for all greedy rows.
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (one, sampling) in enumerate(zip(running, settings)):
        if sampling.temperature != 0.0 or sampling.repetition_penalty != 1.0:
            tokens[row] = choose(logits[row], sampling, one.tokens, one.answer.number, len(one.answer.tokens))
    return tokens


def observe_each(likeliest: Tensor, running: Sequence[RunningPrompt]) -> None:
    """Let the guides of answers note which tokens have the largest logits, before one is chosen.

    Args:
        likeliest: [R] int64.
        running: the answers.
    """
    for one, token in zip(running, likeliest.tolist()):
        if one.answer.guide:
            one.answer.guide.observe(token)


def choose(logits: Tensor, sampling: Sampling, seen: Sequence[int], prompt: int, position: int) -> int:
    """Choose the next token; the result is the same on every rank and in any batch.

    Args:
        logits: [V] float32; -inf for tokens that must not be chosen.
        seen: tokens of the prompt and of the answer so far.
        prompt: number of the prompt, which with `position` and the seed determines the random draw.
        position: position of the token in the answer.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalized(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scores = kept(logits.double().cpu() / sampling.temperature, sampling.top_k, sampling.top_p)
    generator = torch.Generator().manual_seed(mix64(sampling.seed, prompt, position) >> 1)
    # Gumbel-max: the argmax of scores plus Gumbel noise is a draw from their softmax. Noise is tied to the token id, so
    # that scores that differ by rounding yield the same token.
    noise = torch.empty_like(scores).exponential_(generator=generator).log().neg()
    return int((scores + noise).argmax())


def penalized(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Return logits [V] with those of seen tokens divided by the penalty or, if negative, multiplied by it.

    This is CTRL's penalty (Keskar et al. 2019, section 4.1) as defined in transformers.
    """
    index = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=logits.device)
    scores = logits[index]
    return logits.index_copy(0, index, torch.where(scores < 0, scores * penalty, scores / penalty))


def kept(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return scores [V] with -inf outside the `top_k` largest (0: all) and then outside the nucleus `top_p`."""
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))
    if top_p < 1.0:
        probabilities, order = scores.softmax(0).sort(descending=True, stable=True)
        outside = probabilities.cumsum(0) - probabilities >= top_p
        scores = scores.index_fill(0, order[outside], float("-inf"))
    return scores
