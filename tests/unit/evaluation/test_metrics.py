"""Every metric agrees with a reference implementation: with its stored answers, or with a library that is installed."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from torch import tensor
from torchmetrics.functional.classification import binary_auroc

from megatron_anymal.config import ConfigError
from megatron_anymal.evaluation.answer_parsing import caption_in_json, option_letter, option_with_text
from megatron_anymal.evaluation.metrics import captions
from megatron_anymal.evaluation.metrics.ranking import auroc
from megatron_anymal.evaluation.metrics.text_answers import anls, mathvista_accuracy, relaxed_accuracy
from megatron_anymal.evaluation.metrics.vqa_accuracy import textvqa_accuracy, vqa_accuracy

REFERENCES = Path(__file__).parent / "references"
RULES: dict[str, Callable[..., Any]] = {
    "vqa_accuracy": vqa_accuracy,
    "textvqa_accuracy": textvqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "option_letter": lambda text, options: option_letter(text, tuple(options)),
}


@pytest.mark.parametrize("name", RULES)
def test_stored_answers_of_the_reference(name: str) -> None:
    """Tables of inputs and outputs of the reference; each names its source and commit."""
    table = json.loads((REFERENCES / f"{name}.json").read_text())
    wrong = []
    for answer, references, expected in table["cases"]:
        actual = RULES[name](answer, references)
        if actual != (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-12)):
            wrong.append((answer, references, expected, actual))
    assert len(table["cases"]) >= 300 and table["source"] and not wrong, wrong[:3]


def test_leave_one_out_averages() -> None:
    """The averages known from the VQA site: one to four of ten annotators agree."""
    scores = [vqa_accuracy("red", ["red"] * n + [f"other {i}" for i in range(10 - n)]) for n in range(6)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])
    # Without disagreement nothing is normalised.
    assert vqa_accuracy("two", ["2"] * 10) == 0 and vqa_accuracy("two", ["2"] * 9 + ["3"]) == 1


def test_auroc_equals_torchmetrics_and_sklearn() -> None:
    rng = np.random.default_rng(0)
    for case in range(300):
        size = int(rng.integers(2, 40))
        labels = rng.integers(0, 2, size)
        # Some have many ties.
        scores = rng.integers(0, 4, size) / 4 if case % 3 else rng.random(size)
        if 0 < labels.sum() < size:
            area = auroc(scores.tolist(), labels.tolist())
            assert area == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
            assert area == pytest.approx(float(binary_auroc(tensor(scores), tensor(labels))), abs=1e-6)
        else:
            assert np.isnan(auroc(scores.tolist(), labels.tolist()))


@pytest.mark.parametrize(
    ("answer", "kind", "precision", "reference", "score"),
    [
        ("The area is 1,234 in total.", "integer", None, "1234", 1),
        ("3.14159", "float", 2.0, "3.14", 1),
        ("about 0.5", "float", 1.0, "0.5", 1),
        ("about 0.55", "float", 1.0, "0.5", 0),
        ("it is [1, 2] or [2, 3]", "list", None, "[2, 3]", 1),
        ("no number", "integer", None, "0", 0),
        ("Yes", "text", None, "Yes", 1),
    ],
)
def test_mathvista_numbers(answer: str, kind: str, precision: Any, reference: str, score: int) -> None:
    assert mathvista_accuracy(answer, [reference], {"answer_type": kind, "precision": precision}) == score


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ('{"caption": "A cat."}', "A cat."),
        ('Specific: {"caption": "X-1"} \n Generic: {"caption": "A \\"big\\" cat."}', 'A "big" cat.'),
        ('Sure: {"caption" : "A cat that was cut', "A cat that was cut"),
        (" A cat without JSON.\nMore.", "A cat without JSON."),
        ("", ""),
    ],
)
def test_captions_in_json(text: str, caption: str) -> None:
    assert caption_in_json(text) == caption


def test_option_by_its_text() -> None:
    options = ("Yes", "no.", "yes")
    assert option_with_text("No", options) == "B" and option_with_text("yes", options) == ""
    assert option_with_text("no, never", options) == ""


CAPTIONS = ["a dog barks twice", "water runs", "a man's car isn't starting"]
GIVEN = [["a dog barks", "the dog is barking twice"], ["a tap runs", "water flows"], ["a car won't start", "an engine"]]


def test_caption_metrics_are_those_of_the_library() -> None:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given = {n: [captions.python_tokens(text)] for n, text in enumerate(CAPTIONS)}
    wanted = {n: [captions.python_tokens(text) for text in texts] for n, texts in enumerate(GIVEN)}
    for name, scorer in {"cider": Cider(), "rouge_l": Rouge()}.items():
        mean, _ = scorer.compute_score(wanted, given)
        scores = captions.caption_scores(name, CAPTIONS, GIVEN)
        assert mean > 0 and float(np.mean(scores)) == pytest.approx(float(mean))


def test_python_tokens_are_those_of_the_java_tokenizer() -> None:
    if shutil.which("java") is None:
        pytest.skip("no Java")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    rng = random.Random(0)
    words = "Two man's dog isn't (old) 10:30 U.S. don't cannot T-shirt red/blue 5.5 & they'll I'd the women's"
    ends = ["", ".", "...", "!", "?", ","]
    texts = [
        " ".join(rng.choice(words.split()) + rng.choice(ends) for _ in range(rng.randint(1, 9))) for _ in range(300)
    ]
    # Only the Java program decides from the context whether a period after an abbreviation ends a sentence.
    texts = [text for text in texts if "U.S.." not in text and "U.S.," not in text]
    java = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(texts)})
    same = [java[n][0] == captions.python_tokens(text) for n, text in enumerate(texts)]
    assert sum(same) / len(same) > 0.97, [(texts[n], java[n]) for n, equal in enumerate(same) if not equal][:3]


def test_without_java_spice_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "has_java", lambda: False)
    with pytest.raises(ConfigError, match=r"spice .* no `java` .*--without-metric spice spider"):
        captions.require(["cider", "spice", "spider"])
    captions.require(["cider", "rouge_l"])
    assert captions.caption_scores("cider", CAPTIONS, GIVEN)[0] > 0


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (URLError("Name or service not known"), "Name or service not known"),
        (subprocess.CalledProcessError(1, ["java"]), "returned non-zero exit status 1"),
        (TimeoutError("timed out"), "timed out"),
    ],
)
def test_spice_is_tried_before_anything_is_answered(
    trouble: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spice:
        def compute_score(self, references: Any, captions: Any) -> Any:
            assert socket.getdefaulttimeout() == 20
            raise trouble

    monkeypatch.setattr(captions, "has_java", lambda: True)
    monkeypatch.setattr(captions, "_tokenized", lambda texts: texts)
    monkeypatch.setattr("pycocoevalcap.spice.spice.Spice", Spice)
    with pytest.raises(ConfigError, match=rf"spider does not run here: .*{message}.*--without-metric spider"):
        captions.try_spice(["cider", "spider"])
    assert socket.getdefaulttimeout() is None
    captions.try_spice(["cider"])


def test_spice_that_runs_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spice:
        def compute_score(self, references: Any, captions: Any) -> Any:
            return 1.0, [{"All": {"f": 1.0}}]

    monkeypatch.setattr(captions, "has_java", lambda: True)
    monkeypatch.setattr(captions, "_tokenized", lambda texts: texts)
    monkeypatch.setattr("pycocoevalcap.spice.spice.Spice", Spice)
    captions.try_spice(["spice"])
