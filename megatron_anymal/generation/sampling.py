"""How the next token is chosen: one function for checkpoints and exported folders, so that both answer the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_anymal.config import ConfigError
from megatron_anymal.data.global_order import mix64


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where an answer ends.

    Raises:
        ConfigError: a value out of range.
    """

    max_new_tokens: int = 64
    # 0 takes the likeliest token.
    temperature: float = 0.0
    # Only the likeliest tokens that together have this probability.
    top_p: float = 1.0
    # Only this many of the likeliest tokens; 0: all.
    top_k: int = 0
    # Above 1, tokens that the prompt or the answer holds become less likely.
    repetition_penalty: float = 1.0
    # An answer ends before the first of these texts.
    stop: tuple[str, ...] = ()
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
    """The next token; the same on every rank and in any batch.

    Args:
        logits: [V] float32; -inf where a token must not come.
        seen: the prompt's and the answer's tokens so far.
        prompt: the prompt's number, which with `place` and the seed decides what chance brings.
        place: the token's number in the answer.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalized(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scores = kept(logits.double().cpu() / sampling.temperature, sampling.top_k, sampling.top_p)
    generator = torch.Generator().manual_seed(mix64(sampling.seed, prompt, place) >> 1)
    # The largest of scores with Gumbel noise is a draw from their softmax. Noise goes with the token's id, so that
    # scores that differ by rounding draw the same token.
    noise = torch.empty_like(scores).exponential_(generator=generator).log().neg()
    return int((scores + noise).argmax())


def penalized(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Logits [V] where those of the tokens seen are divided by the penalty, negative ones multiplied with it.

    CTRL's penalty (Keskar et al. 2019, section 4.1) as transformers defines it.
    """
    index = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=logits.device)
    scores = logits[index]
    return logits.index_copy(0, index, torch.where(scores < 0, scores * penalty, scores / penalty))


def kept(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores [V] with -inf outside of the `top_k` largest (0: all), and of these outside of the nucleus `top_p`."""
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))
    if top_p < 1.0:
        probabilities, order = scores.softmax(0).sort(descending=True, stable=True)
        outside = probabilities.cumsum(0) - probabilities >= top_p
        scores = scores.index_fill(0, order[outside], float("-inf"))
    return scores
