"""Sentences of growing texts, and the gate that lets them out only after a check."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_anymal.generation.rejection import Rejection
from megatron_anymal.integrity.sentences import Sentence, SentenceGate, Sentences

LONG = 400

# Sentences as Unicode's annex 29 splits them, joined by |. Each text is fed as one piece and character by character.
SPLIT = [
    "One here. |Two here!  |Three?",
    "It costs 3.14 euros. |Next",
    "See e.g. this one. |Next",
    "He said “Go!” |Then left (soon.) |Next",
    "What?! |No... |Yes",
    "first line\n|second line\n\n|third",
    "你好。|再见\uff01|明天\uff1f|好",
    "कुत्ता दौड़ता है। |बिल्ली सोती है। |घर",
    "هل هذا؟ |نعم. |لا",
    "សួស្តី។ |លា",
    "no end at all",
    "",
]


def sentences(text: str, size: int, longest: int = LONG, overlap: int = 80) -> list[Sentence]:
    splitter, split_sentences = Sentences(longest, overlap), []
    for start in range(0, len(text), size):
        split_sentences += splitter.add(text[start : start + size])
    return [*split_sentences, *splitter.finish()]


@pytest.mark.parametrize("marked", SPLIT)
def test_sentences_of_several_scripts(marked: str) -> None:
    text, expected = marked.replace("|", ""), [one for one in marked.split("|") if one]
    for size in (1, 2, 5, 1000):
        split_sentences = sentences(text, size)
        assert [one.text for one in split_sentences] == expected
        assert [one.before for one in split_sentences] == ["".join(expected[:n]) for n in range(len(expected))]


@pytest.mark.parametrize("longest", [20, 50])
def test_a_sentence_that_never_ends_is_cut_with_an_overlap(longest: int) -> None:
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(["red", "boat", "ไม่มีวรรคตอน", "river"], size=60))
    whole = sentences(text, 1000, longest, 12)
    assert whole == sentences(text, 1, longest, 12) == sentences(text, 7, longest, 12)
    assert "".join(one.text[: one.shown] for one in whole) == text and max(len(one.text) for one in whole) <= longest
    # Every stretch of 12 characters is checked in one piece before any of it is shown.
    for start in range(len(text) - 12):
        [first] = [one for one in whole if len(one.before) <= start < len(one.before) + one.shown]
        assert text[start : start + 12] in first.text


def test_nothing_of_a_violating_sentence_comes_out() -> None:
    """However the text is cut into pieces, and wherever the sentence is."""
    violation = Rejection("output_text", "words", "zorp", 0.9)
    rng = np.random.default_rng(1)
    for number in range(200):
        parts = [f"Sentence {n} is harmless. " for n in range(6)]
        parts[number % 6] = "This one has zorp in it. "
        text, shown, checked = "".join(parts), "", list[str]()

        def check(sentence: Sentence, checked: list[str] = checked) -> Rejection | None:
            checked.append(sentence.text)
            return violation if "zorp" in sentence.text else None

        gate = SentenceGate(check, LONG, 80)
        position = 0
        while position < len(text):
            size = int(rng.integers(1, 12))
            shown += gate.add(text[position : position + size])
            # Nothing is shown that has not been checked.
            assert shown == "".join(checked[: len(checked) - (gate.rejection is not None)])
            position += size
        shown += gate.finish()
        assert shown == gate.released == "".join(parts[: number % 6]) and gate.rejection is violation
        # Checks end with the violation.
        assert len(checked) == number % 6 + 1


def test_a_harmless_text_comes_out_whole() -> None:
    gate = SentenceGate(lambda sentence: None, LONG, 80)
    shown = [gate.add(piece) for piece in ("Hel", "lo. Wo", "rld", ". 3", ".1")]
    assert shown == ["", "Hello. ", "", "World. ", ""] and gate.finish() == "3.1" and gate.rejection is None


def test_a_violation_across_a_cut_is_held_back() -> None:
    """A phrase that is no longer than the overlap is never shown in part."""
    for offset in range(80):
        text = "x" * offset + "very bad phrase" + "y" * 70
        gate = SentenceGate(
            lambda s: Rejection("output_text", "words", "bad") if "very bad phrase" in s.text else None, 40, 15
        )
        shown = "".join(map(gate.add, text)) + gate.finish()
        assert gate.rejection and set(shown) <= {"x"}
