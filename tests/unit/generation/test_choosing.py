"""Choice of the next token: the candidates that transformers' processors leave, drawn with their probabilities."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_anymal.config import ConfigError
from megatron_anymal.generation.next_token import choose, kept, penalized
from megatron_anymal.generation.sampling import Sampling

VOCABULARY = 200


def logits_of(seed: int) -> torch.Tensor:
    """Random logits with one impossible token."""
    logits = 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits[7] = float("-inf")
    return logits


@pytest.mark.parametrize("penalty", [1.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_is_that_of_transformers(penalty: float, seed: int) -> None:
    logits, seen = logits_of(seed), [3, 5, 5, 199, 0, 7, *range(20, 40)]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())[0]
    assert (logits[seen] < 0).any() and (logits[seen] > 0).any()
    assert torch.equal(penalized(logits, seen, penalty), expected)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50, VOCABULARY, 1000])
def test_candidates_are_those_of_transformers(top_k: int, top_p: float) -> None:
    warpers = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for seed in range(10):
        scores = logits_of(seed).double()
        expected = warpers(torch.zeros(1, 1, dtype=torch.int64), scores[None])[0]
        assert torch.equal(kept(scores, top_k, top_p), expected)


def test_tied_candidates_stay_together() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 0.0])
    assert torch.equal(kept(scores, 2, 1.0), TopKLogitsWarper(2)(torch.zeros(1, 1), scores[None])[0])


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert choose(logits, Sampling(), [1], 0, 0) == 1
    assert choose(logits, Sampling(repetition_penalty=1.5), [1], 0, 0) == 2


def test_tokens_are_drawn_with_the_probabilities_that_transformers_gives_them() -> None:
    logits, seen = logits_of(1)[:12], [2, 4]
    sampling = Sampling(temperature=1.7, top_k=8, top_p=0.8, repetition_penalty=1.2)
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(1.7),
            TopKLogitsWarper(8),
            TopPLogitsWarper(0.8),
        ]
    )
    expected = processors(torch.tensor([seen]), logits[None].clone())[0].softmax(0)
    draws = 4000
    drawn = torch.tensor([choose(logits, sampling, seen, n % 7, n) for n in range(draws)])
    frequencies = torch.bincount(drawn, minlength=12) / draws
    assert (frequencies[expected == 0] == 0).all() and 0 < (expected > 0).sum() < 8
    assert ((frequencies - expected).abs() <= 4.5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


def test_chance_depends_on_seed_prompt_and_place_alone() -> None:
    logits = logits_of(3)

    def drawn(seed: int, prompt: int) -> list[int]:
        return [choose(logits, Sampling(temperature=2.0, seed=seed), [], prompt, position) for position in range(30)]

    assert drawn(1, 2) == drawn(1, 2)
    assert len({tuple(drawn(seed, prompt)) for seed in (1, 2) for prompt in (2, 3)}) == 4
    assert len(set(drawn(1, 2))) > 5


def test_rounding_does_not_change_what_is_drawn() -> None:
    logits = logits_of(4)
    # Two tokens whose order after sorting changes.
    logits[[20, 21]] = torch.tensor([2.0, 2.0 + 1e-6])
    other = logits.clone()
    other[[20, 21]] = torch.tensor([2.0 + 1e-6, 2.0])
    sampling = Sampling(temperature=1.5, top_p=0.98)
    for position in range(300):
        assert choose(logits, sampling, [], 0, position) == choose(other, sampling, [], 0, position)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("stop", ("a", "")),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.* must be "):
        Sampling(**{name: value})  # type: ignore[arg-type]
