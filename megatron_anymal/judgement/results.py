"""Results of a comparison: shares of wins, mean rubrics, agreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import numpy as np

from megatron_anymal.judgement.agreement import krippendorff_alpha
from megatron_anymal.judgement.rubrics import RUBRICS

RESAMPLES, LEVEL = 2000, 0.95
# Resamples that are computed together.
_BLOCK = 50
# Level of measurement of the pairwise choice and of the rubrics.
_CHOICE_LEVEL, _RUBRIC_LEVEL = "nominal", "ordinal"


@dataclass(frozen=True)
class Estimate:
    """A mean over judgements with its interval."""

    # The mean.
    value: float
    # Lower end of the interval.
    low: float
    # Upper end of the interval.
    high: float


def latest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last judgement of every annotator and item, in the order of their first ones."""
    return list({(row["annotator"], row["item"]): row for row in rows}.values())


def bootstrap(totals: np.ndarray, counts: np.ndarray, seed: int = 0) -> list[Estimate]:
    """Means with 95 % percentile intervals.

    Items are drawn with replacement, each with all of its judgements: those of one item depend on each other.

    Args:
        totals: sums of several quantities over the judgements of each item, [items, quantities].
        counts: judgements of each item, [items].
        seed: of the draws.
    """
    items = len(counts)
    rng, means = np.random.default_rng(seed), []
    for start in range(0, RESAMPLES, _BLOCK):
        weights = rng.multinomial(items, np.full(items, 1 / items), size=min(_BLOCK, RESAMPLES - start))
        means.append((weights @ totals) / (weights @ counts)[:, None])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    values = totals.sum(axis=0) / counts.sum()
    return [Estimate(*map(float, numbers)) for numbers in zip(values, low, high)]


def compute(rows: Sequence[Mapping[str, Any]], items: int, names: tuple[str, str]) -> dict[str, Any]:
    """All results as JSON.

    Args:
        rows: of the journal.
        items: number of items, judged or not.
        names: of the models A and B.
    """
    judgements = latest(rows)
    by_item: dict[str, list[Mapping[str, Any]]] = {}
    for row in judgements:
        by_item.setdefault(row["item"], []).append(row)
    result = {
        "a": names[0],
        "b": names[1],
        "items": items,
        "judged_items": len(by_item),
        "judgements": len(judgements),
        "annotators": dict(Counter(row["annotator"] for row in judgements)),
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "resampled": "items"},
        "pairwise": None,
        "rubrics": None,
        "first_shown_preferred": _first_preferred(judgements),
        "agreement": _agreement(list(by_item.values())),
    }
    if by_item:
        result |= _estimates(list(by_item.values()))
    return result


def _estimates(groups: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Shares of choices and mean scores, by item's judgements."""
    totals = np.array([np.sum([_quantities(row) for row in group], axis=0) for group in groups], dtype=float)
    counts = np.array([len(group) for group in groups])
    estimates = iter([asdict(estimate) for estimate in bootstrap(totals, counts)])
    choices = Counter(row["choice"] for group in groups for row in group)
    pairwise = {
        name: {"count": choices[choice], **next(estimates)}
        for name, choice in (("a_wins", "a"), ("tie", "tie"), ("b_wins", "b"))
    }
    rubrics = {rubric.name: {name: next(estimates) for name in ("a", "b", "difference")} for rubric in RUBRICS}
    return {"pairwise": pairwise, "rubrics": rubrics}


def _quantities(row: Mapping[str, Any]) -> list[int]:
    """What is averaged over judgements: three choices, then for each rubric both scores and their difference."""
    a, b = row["scores"]["a"], row["scores"]["b"]
    scores = [value for r in RUBRICS for value in (a[r.name], b[r.name], a[r.name] - b[r.name])]
    return [*(int(row["choice"] == choice) for choice in ("a", "tie", "b")), *scores]


def _first_preferred(judgements: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often the answer that was shown first was preferred, of the judgements that are not ties."""
    decided = [row for row in judgements if row["choice"] != "tie"]
    return {"count": sum(row["choice"] == row["first"] for row in decided), "of": len(decided)}


def _agreement(groups: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Krippendorff's alpha of the choice and of each rubric; for rubrics, each answer is a unit."""
    shared = [group for group in groups if len(group) > 1]
    choice: Optional[float] = krippendorff_alpha([[row["choice"] for row in g] for g in shared], _CHOICE_LEVEL)
    result = {"choice": {"level": _CHOICE_LEVEL, "alpha": choice, "units": len(shared)}}
    for rubric in RUBRICS:
        units = [[row["scores"][model][rubric.name] for row in group] for group in shared for model in ("a", "b")]
        alpha = krippendorff_alpha(units, _RUBRIC_LEVEL)
        result[rubric.name] = {"level": _RUBRIC_LEVEL, "alpha": alpha, "units": len(units)}
    return result
