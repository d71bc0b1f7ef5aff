"""Prompts and answers of a comparison, the order in which answers are shown, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judgements import make_items, make_prompts, write_lines

from megatron_anymal.data.journal import Journal, read_journal
from megatron_anymal.data.records import DataError
from megatron_anymal.judgement.comparison import Comparison, annotator_name, first_shown, keep_settings
from megatron_anymal.judgement.items import read_answers, read_questions

BEST, WORST = ({"recognition": n, "accuracy": n, "integrity": n} for n in (2, 0))


def test_the_order_is_a_fair_coin_of_seed_annotator_and_item() -> None:
    keys = [f"q{n}" for n in range(2000)]
    orders = {
        (seed, name): [first_shown(seed, name, key) for key in keys] for seed in (0, 1) for name in ("ann", "bob")
    }
    for one, order in orders.items():
        assert 0.45 < order.count("a") / len(keys) < 0.55
        for other in orders.keys() - {one}:
            assert 0.45 < sum(a == b for a, b in zip(order, orders[other])) / len(keys) < 0.55
    assert orders[0, "ann"] == [first_shown(0, "ann", key) for key in keys]


def test_a_choice_is_recorded_for_the_model(tmp_path: Path) -> None:
    items = make_items(tmp_path, 12)
    journal = Journal(tmp_path / "judgements.jsonl")
    comparison = Comparison(items, journal, seed=5)
    for number, item in enumerate(items):
        shown = comparison.shown("ann", number)
        assert shown["judgement"] is None
        order = [{item.a: "a", item.b: "b"}[answer] for answer in shown["answers"]]
        comparison.record("ann", number, "second", [WORST, BEST], 1.25)
        row = read_journal(tmp_path / "judgements.jsonl")[-1]
        assert row["choice"] == order[1] and row["first"] == order[0] == first_shown(5, "ann", item.question.key)
        assert row["scores"] == {order[0]: WORST, order[1]: BEST} and row["seconds"] == 1.2
        assert comparison.shown("ann", number)["judgement"] == {"choice": "second", "scores": [WORST, BEST]}
    assert {row["first"] for row in read_journal(tmp_path / "judgements.jsonl")} == {"a", "b"}
    assert comparison.judged("ann") == list(range(12)) and comparison.judged("bob") == []
    journal.close()
    again = Comparison(items, Journal(tmp_path / "judgements.jsonl"), seed=5)
    assert again.judged("ann") == list(range(12))
    assert again.shown("ann", 3)["judgement"] == {"choice": "second", "scores": [WORST, BEST]}


@pytest.mark.parametrize(
    ("choice", "scores", "message"),
    [
        ("a", [BEST, BEST], "choice='a'"),
        (None, [BEST, BEST], "choice=None"),
        ("tie", [BEST], "two objects"),
        ("tie", [BEST, {**BEST, "accuracy": 1}], "accuracy=1 must be one of 0, 2"),
        ("tie", [BEST, {**BEST, "accuracy": True}], "accuracy=True"),
        ("tie", [BEST, {"accuracy": 2}], "recognition, accuracy, integrity"),
    ],
)
def test_other_judgements_are_refused(tmp_path: Path, choice: object, scores: object, message: str) -> None:
    comparison = Comparison(make_items(tmp_path, 1), Journal(tmp_path / "judgements.jsonl"), 0)
    with pytest.raises(DataError, match=message):
        comparison.record("ann", 0, choice, scores, 1)
    assert not read_journal(tmp_path / "judgements.jsonl")


@pytest.mark.parametrize("name", ["", "  ", "x" * 65, "a\nb", "<b>", "a/b", None])
def test_names(name: str | None) -> None:
    with pytest.raises(DataError, match="1 to 64"):
        annotator_name(name)
    assert annotator_name(" Zoë O. ") == "Zoë O."


def test_a_changed_comparison_is_refused(tmp_path: Path) -> None:
    keep_settings(tmp_path / "comparison.json", {"a": "x", "seed": 0})
    keep_settings(tmp_path / "comparison.json", {"a": "x", "seed": 0})
    with pytest.raises(DataError, match="other values of 'seed'"):
        keep_settings(tmp_path / "comparison.json", {"a": "x", "seed": 1})
    one, two = make_items(tmp_path / "one", 1), make_items(tmp_path / "two", 1)
    assert one[0].fingerprint == two[0].fingerprint != type(one[0])(one[0].question, "other", one[0].b).fingerprint


PROMPTS = {
    "no media file": [{"parts": [{"text": "x"}, {"media": "none.png"}]}],
    "no modality of this run reads": [{"parts": [{"text": "x"}, {"media": "x.xyz"}]}],
    "'k' occurs twice": [{"key": "k", "parts": [{"text": "x"}]}, {"key": "k", "parts": [{"text": "x"}]}],
    "key True must be": [{"key": True, "parts": [{"text": "x"}]}],
    "must end with the user turn": [{"messages": [{"role": "assistant", "content": "x"}]}],
    "is empty": [],
}


@pytest.mark.parametrize("message", PROMPTS)
def test_prompts_that_cannot_be_shown(tmp_path: Path, message: str) -> None:
    (tmp_path / "x.xyz").write_bytes(b"")
    write_lines(tmp_path / "prompts.jsonl", PROMPTS[message])
    with pytest.raises(DataError, match=message):
        read_questions(str(tmp_path / "prompts.jsonl"))


ANSWERS = {
    "`prompt` from 0 to 2": [{"prompt": 3, "answer": "x"}],
    "needs `key`": [{"key": "none", "answer": "x"}],
    "must be a string": [{"prompt": 0, "answer": 1}],
    "'q1' has a second answer": [{"prompt": 1, "answer": "x"}, {"key": "q1", "answer": "x"}],
    "no answer to 2 of the prompts, the first is 'q0'": [{"key": "q1", "answer": "x"}],
}


@pytest.mark.parametrize("message", ANSWERS)
def test_answers_that_do_not_fit(tmp_path: Path, message: str) -> None:
    questions = read_questions(make_prompts(tmp_path, 3))
    write_lines(tmp_path / "answers.jsonl", ANSWERS[message])
    with pytest.raises(DataError, match=message):
        read_answers(str(tmp_path / "answers.jsonl"), questions)


def test_answers_by_key_in_any_order(tmp_path: Path) -> None:
    questions = read_questions(make_prompts(tmp_path, 3))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    keyed = [{"key": f"q{line['prompt']}", "answer": line["answer"]} for line in reversed(lines)]
    write_lines(tmp_path / "keyed.jsonl", keyed)
    assert read_answers(str(tmp_path / "keyed.jsonl"), questions) == read_answers(str(tmp_path / "a.jsonl"), questions)
