"""Shares, means and intervals of a comparison, and its preference pairs."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from judgements import make_items, row
from scipy import stats

from megatron_anymal.data.samples import parse_sample
from megatron_anymal.judgement.preferences import preference_pairs
from megatron_anymal.judgement.report import render, write_report
from megatron_anymal.judgement.results import bootstrap, compute


def test_intervals_are_those_of_scipy() -> None:
    """For one judgement per item; both draw 2000 samples of their own."""
    values = np.random.default_rng(1).random((80, 2)) * [1, 10]
    estimates = bootstrap(values, np.ones(80))
    for column, estimate in zip(values.T, estimates):
        reference = stats.bootstrap((column,), np.mean, n_resamples=20_000, method="percentile", rng=2)
        spread = reference.confidence_interval.high - reference.confidence_interval.low
        assert estimate.value == pytest.approx(column.mean())
        assert estimate.low == pytest.approx(reference.confidence_interval.low, abs=0.05 * spread)
        assert estimate.high == pytest.approx(reference.confidence_interval.high, abs=0.05 * spread)


def test_judgements_of_one_item_are_drawn_together() -> None:
    """Fifty annotators who all copy each other count for no more than one."""
    one = np.random.default_rng(3).integers(0, 2, (40, 1)).astype(float)
    alone, copied = bootstrap(one, np.ones(40)), bootstrap(50 * one, np.full(40, 50))
    assert copied == alone and alone[0].high - alone[0].low > 0.2


def test_results_by_hand() -> None:
    rows = [
        row("q0", "ann", "b"),
        row("q0", "ann", "a", a=(2, 2, 2), b=(0, 0, 2)),
        row("q0", "bob", "tie", a=(1, 2, 2), b=(1, 0, 2)),
        row("q1", "ann", "b", a=(0, 0, 2), b=(2, 2, 2)),
        row("q2", "bob", "a", a=(2, 2, 0), b=(2, 2, 2)),
    ]
    result = compute(rows, 5, ("one", "two"))
    assert (result["judged_items"], result["judgements"]) == (3, 4)
    assert result["annotators"] == {"ann": 2, "bob": 2}
    shares = {name: (entry["count"], entry["value"]) for name, entry in result["pairwise"].items()}
    assert shares == {"a_wins": (2, 0.5), "tie": (1, 0.25), "b_wins": (1, 0.25)}
    recognition = result["rubrics"]["recognition"]
    assert (recognition["a"]["value"], recognition["b"]["value"]) == (5 / 4, 5 / 4)
    assert result["rubrics"]["integrity"]["difference"]["value"] == -0.5
    assert all(e["low"] <= e["value"] <= e["high"] for r in result["rubrics"].values() for e in r.values())
    # Two who disagree on one item: o = 2 of 2, e = 2 of 2 * 1, so alpha = 0.
    assert result["agreement"]["choice"] == {"level": "nominal", "alpha": 0.0, "units": 1}
    assert result["agreement"]["accuracy"] == {"level": "ordinal", "alpha": 1.0, "units": 2}
    assert result["agreement"]["integrity"]["alpha"] is None
    assert result["first_shown_preferred"] == {"count": 2, "of": 3}


class Words(HTMLParser):
    """Collects the text of a page, and its elements."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words, self.tags = "", set[str]()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_reports_agree_and_escape(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|x"
    rows = [row(f"q{n}", name, "ab"[n % 2]) for n in range(9) for name in ("ann", "bob")]
    result = compute(rows, 9, (evil, "two"))
    write_report(tmp_path, result)
    assert json.loads((tmp_path / "results.json").read_text()) == result
    markdown, page = (tmp_path / "results.md").read_text(), Words((tmp_path / "results.html").read_text())
    for text in ("55.6 % (", "44.4 % (", "2.00 (2.00 to 2.00)", "1.000", "undefined", "ann (9), bob (9)"):
        assert text in markdown and text in " ".join(page.words.split()), text
    assert evil in page.words and "script" not in page.tags
    assert "&lt;script>alert(1)&lt;/script>\\|x" in markdown


def test_a_report_of_nothing() -> None:
    result = compute([], 3, ("one", "two"))
    assert result["pairwise"] is None and "Nothing has been judged yet" in render("results.md.j2", result, escape=False)
    assert "nobody yet" in render("results.html.j2", result, escape=True)


def test_pairs_follow_the_majority(tmp_path: Path) -> None:
    items = make_items(tmp_path / "source", 7)
    items[5] = type(items[5])(items[5].question, "same", "same")
    items[6] = type(items[6])(items[6].question, "", "nine")
    rows = [row("q0", "ann", "a"), row("q1", "ann", "b"), row("q1", "bob", "b"), row("q1", "eve", "a")]
    rows += [row("q2", "ann", "a"), row("q2", "bob", "b"), row("q3", "ann", "tie"), row("q3", "bob", "a")]
    rows += [row("q5", "ann", "a"), row("q6", "ann", "b")]
    pairs, without = preference_pairs(items, rows, tmp_path / "pairs")
    assert {p["key"]: (p["chosen"], p["rejected"]) for p in pairs} == {
        "q0": (items[0].a, items[0].b),
        "q1": (items[1].b, items[1].a),
        "q3": (items[3].a, items[3].b),
    }
    assert without == {"tie": 1, "not judged": 1, "same answers": 1, "an empty answer": 1}
    for pair in pairs:
        assert parse_sample(pair, "pair").kind == "preference"
        [medium] = [part["media"] for part in pair["messages"][0]["content"] if "media" in part]
        assert (tmp_path / "pairs" / medium).resolve().parent == tmp_path / "source"
