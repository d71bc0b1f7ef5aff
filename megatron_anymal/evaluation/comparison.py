"""Paired bootstrap between two results on the same samples (Efron & Tibshirani 1993, chapters 13 and 16)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_anymal.data.records import DataError
from megatron_anymal.evaluation.metric_registry import METRICS

RESAMPLES = 5000
# Numbers drawn at once.
_DRAWS = 1 << 22


@dataclass(frozen=True)
class Difference:
    """A metric's difference between two results, in the unit of the scores."""

    # Name of the task.
    task: str
    # Name of the metric.
    metric: str
    # Number of samples that both have.
    samples: int
    # This result's score minus the other's, on those samples.
    difference: float
    # Lower end of the percentile interval of 95 %.
    low: float
    # Its upper end.
    high: float
    # Two-sided probability of such a difference if there were none.
    p: float


def compare(this: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """Compare all metrics of all tasks that two results share.

    Args:
        this: of `read_results`, as is `other`.

    Raises:
        DataError: they share no task, or no samples of a task.
    """
    names = [name for name in this["tasks"] if name in other["tasks"]]
    if not names:
        raise DataError(f"--against: the results share no task; the other has: {', '.join(other['tasks']) or 'none'}.")
    return [difference for name in names for difference in _of_task(name, this["tasks"][name], other["tasks"][name])]


def _of_task(name: str, this: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    theirs = {row["key"]: row for row in other["answers"]}
    pairs = [(row, theirs[row["key"]]) for row in this["answers"] if row["key"] in theirs]
    if not pairs:
        raise DataError(f"--against: the results of {name!r} have no samples in common.")
    differences = []
    for metric in this["scores"]:
        if metric in other["scores"]:
            values = np.array([[row["values"][metric] for row in pair] for pair in pairs])
            labels = np.array([pair[0]["label"] for pair in pairs])
            differences.append(Difference(name, metric, len(pairs), *bootstrap(metric, values, labels)))
    return differences


def bootstrap(
    metric: str, values: np.ndarray, labels: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float, float]:
    """Difference, ends of the 95 % interval, and p.

    Args:
        values: [n, 2] of the samples in both results.
        labels: [n] int, for metrics that rank.
    """
    difference = _difference(metric, values, labels)
    rng, count = np.random.default_rng(seed), len(values)
    drawn: list[np.ndarray] = []
    at_once = max(1, _DRAWS // count)
    for start in range(0, resamples, at_once):
        chosen = rng.integers(0, count, (min(at_once, resamples - start), count))
        if METRICS[metric].ranks:
            drawn.append(np.array([_difference(metric, values[row], labels[row]) for row in chosen]))
        else:
            drawn.append(100 * (values[:, 0] - values[:, 1])[chosen].mean(1))
    together = np.concatenate(drawn)
    # Resamples without samples of both classes have no score.
    together = together[~np.isnan(together)]
    low, high = np.percentile(together, (2.5, 97.5))
    # The same distribution moved to the hypothesis of no difference.
    extreme = np.abs(together - difference) >= abs(difference) - 1e-12
    return difference, float(low), float(high), float((extreme.sum() + 1) / (len(together) + 1))


def _difference(metric: str, values: np.ndarray, labels: np.ndarray) -> float:
    this, other = (METRICS[metric].score(values[:, side].tolist(), labels.tolist()) for side in (0, 1))
    return this - other
