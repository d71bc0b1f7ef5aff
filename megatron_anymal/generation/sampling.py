"""Sampling of the next token, shared by checkpoints and exported folders so that both give the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_anymal.config import ConfigError
from megatron_anymal.data.global_order import mix64


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token and ending an answer.

    Raises:
        ConfigError: a value out of range.
    """

    # Maximum length of an answer, in tokens.
    max_new_tokens: int = 64
    # 0: greedy, the likeliest token.
    temperature: float = 0.0
    # Sample only from the likeliest tokens that together have this probability.
    top_p: float = 1.0
    # Sample only from this many of the likeliest tokens; 0: all.
    top_k: int = 0
    # Above 1, tokens that occur in the prompt or the answer become less likely.
    repetition_penalty: float = 1.0
    # An answer ends before the first of these texts.
    stop: tuple[str, ...] = ()
    # Seed of the draws.
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or above"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0 (1: none)"),
            "stop": ("" not in self.stop, "a text that is not empty"),
        }
        for name, (holds, wanted) in limits.items():
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)} must be {wanted}.")


def choose(logits: Tensor, sampling: Sampling, seen: Sequence[int], prompt: int, place: int) -> int:
    """Choose the next token; the result is the same on every rank and in any batch.

    Args:
        logits: [V] float32; -inf for tokens that must not be chosen.
        seen: tokens of the prompt and of the answer so far.
        prompt: number of the prompt, which with `place` and the seed determines the random draw.
        place: position of the token in the answer.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalized(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scores = kept(logits.double().cpu() / sampling.temperature, sampling.top_k, sampling.top_p)
    generator = torch.Generator().manual_seed(mix64(sampling.seed, prompt, place) >> 1)
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
