"""The paired bootstrap agrees with scipy's, and reports what differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from megatron_anymal.data.records import DataError
from megatron_anymal.evaluation.comparison import bootstrap, compare
from megatron_anymal.evaluation.report import markdown


def test_interval_and_p_of_a_mean() -> None:
    """Against scipy's bootstrap, and the t-test, to which the bootstrap's p converges."""
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.03, 0.08):
        values = rng.normal((0.5 + shift, 0.5), 0.3, (400, 2)) + rng.normal(0, 0.5, (400, 1))
        difference, low, high, p = bootstrap("vqa_accuracy", values, np.zeros(400, dtype=int))
        each = 100 * (values[:, 0] - values[:, 1])
        reference = stats.bootstrap((each,), np.mean, n_resamples=5000, method="percentile", rng=2)
        assert difference == pytest.approx(each.mean())
        assert (low, high) == pytest.approx(tuple(reference.confidence_interval), abs=0.3)
        assert p == pytest.approx(stats.ttest_rel(values[:, 0], values[:, 1]).pvalue, abs=0.03)


def test_ranking_metrics_are_resampled_whole() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 200)
    values = np.stack([labels + rng.normal(0, 0.8, 200), labels + rng.normal(0, 1.6, 200)], 1)
    difference, low, high, p = bootstrap("auroc", values, labels, resamples=800)
    reference = stats.bootstrap(
        (values[:, 0], values[:, 1], labels),
        lambda this, other, y: 100 * (roc_auc_score(y, this) - roc_auc_score(y, other)),
        paired=True,
        vectorized=False,
        n_resamples=800,
        method="percentile",
        rng=4,
    )
    this, other = (roc_auc_score(labels, values[:, side]) for side in (0, 1))
    assert difference == pytest.approx(100 * (this - other))
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval), abs=1.0)
    # The interval's distance from zero, in standard errors of a normal distribution.
    assert p == pytest.approx(2 * stats.norm.sf(2 * 1.96 * difference / (high - low)), abs=0.01)


def result(**values: list[float]) -> dict[str, Any]:
    """A result of one task with these values per metric."""
    count = len(next(iter(values.values())))
    rows = [
        {"key": str(n), "label": n % 2, "values": {name: column[n] for name, column in values.items()}}
        for n in range(count)
    ]
    return {"tasks": {"vqav2": {"scores": {name: {} for name in values}, "answers": rows}}}


def test_the_report_says_how_captions_were_split() -> None:
    task = {"title": "T", "samples": 1, "unparsed": 0, "notes": "", "breakdown": {}, "paper": None}
    score = {"title": "CIDEr", "value": 1.0, "standard_error": None}
    for tokens in ("java", "python"):
        tasks = {"coco_captions": {**task, "scores": {"cider": score}}}
        text = markdown({"checkpoint": "c", "caption_tokens": tokens, "tasks": tasks})
        assert ("split in Python" in text) == (tokens == "python") and "| T | CIDEr | 1.0 | 1 |" in text


def test_only_shared_samples_and_metrics_are_compared() -> None:
    this, other = result(vqa_accuracy=[1.0, 0.0, 1.0], anls=[1.0, 1.0, 1.0]), result(vqa_accuracy=[0.0, 0.0])
    [difference] = compare(this, other)
    assert (difference.metric, difference.samples, difference.difference) == ("vqa_accuracy", 2, 50.0)
    with pytest.raises(DataError, match="share no task; the other has: mmmu"):
        compare(this, {"tasks": {"mmmu": other["tasks"]["vqav2"]}})
    for row in other["tasks"]["vqav2"]["answers"]:
        row["key"] = "x" + row["key"]
    with pytest.raises(DataError, match="'vqav2' have no samples in common"):
        compare(this, other)
