"""Accuracy of VQA (Antol et al. 2015) with its normalisation, as in the official evaluation and in that of TextVQA.

An answer scores min(matches / 3, 1) against the references without one of them, averaged over which one is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official code passes re.UNICODE (32) where `sub` takes the largest number of replacements.
_PERIODS = 32
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS.split())}}
_ARTICLES = ("a", "an", "the")
# Correct forms. The official table maps to them from the same word with any one apostrophe left out.
_CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_RESTORED = {
    form[:at] + form[at + 1 :]: form
    for form in _CONTRACTIONS.split()
    for at, character in enumerate(form)
    if character == "'"
}
# An entry of the official table that goes the other way.
_RESTORED["somebody'd"] = "somebodyd"


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy as in the official evaluation of VQA, also used for OK-VQA and VizWiz.

    Nothing is normalised if all references agree.
    """
    answer, references = _on_one_line(answer), [_on_one_line(reference) for reference in references]
    if len(set(references)) > 1:
        answer, references = normalized(answer), [normalized(reference) for reference in references]
    return _leave_one_out(answer, references)


def textvqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy as in TextVQA's evaluation: always normalised, after commas, question marks and possessives."""
    return _leave_one_out(*_all_normalized(_textvqa_normalized, answer, references))


def normalized(text: str) -> str:
    """Normalisation of VQA: punctuation, numbers up to ten as digits, no articles, contractions."""
    joins = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if joins or f"{mark} " in text or f" {mark}" in text else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", out, count=_PERIODS).lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def _textvqa_normalized(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalized(_on_one_line(text))


def _all_normalized(rule: Callable[[str], str], answer: str, references: Sequence[str]) -> tuple[str, list[str]]:
    return rule(answer), [rule(reference) for reference in references]


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(answer: str, references: Sequence[str]) -> float:
    matches = [reference == answer for reference in references]
    scores = [min(1.0, (sum(matches) - matched) / 3) for matched in matches]
    return sum(scores) / len(scores)
