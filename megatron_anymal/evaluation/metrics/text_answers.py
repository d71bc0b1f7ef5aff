"""Metrics of short answers: ANLS, ChartQA's relaxed accuracy, MathVista's comparison, exact match."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_anymal.evaluation.metrics.vqa_accuracy import normalized

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\.\d+")
_LIST = re.compile(r"\[[^\[\]]*\]")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference after VQA's normalisation."""
    return float(normalized(answer) in map(normalized, references))


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest reference, 0 below the threshold (Biten et al. 2019, ST-VQA)."""
    best = max(_similarity(answer.lower().strip(), reference.lower().strip()) for reference in references)
    return best if best >= threshold else 0.0


def relaxed_accuracy(answer: str, references: Sequence[str], tolerance: float = 0.05) -> float:
    """1 if a number is within 5 % of the reference, or a text is equal but for case (ChartQA, section 5.1)."""
    return float(any(_relaxed_equal(answer, reference, tolerance) for reference in references))


def mathvista_answer(answer: str, answer_type: str, precision: Any) -> str:
    """The number or list in an answer to a free-form question, written as MathVista's evaluation writes it.

    That lets a GPT extract the answer; here it is the last list or number of the text.
    """
    if answer_type == "list":
        lists = _LIST.findall(answer)
        return lists[-1] if lists else answer.strip()
    if answer_type not in ("integer", "float"):
        return answer.strip()
    numbers = _NUMBER.findall(answer)
    if not numbers:
        return ""
    value = float(numbers[-1].replace(",", ""))
    return str(int(value)) if answer_type == "integer" else str(round(value, int(precision or 0)))


def mathvista_accuracy(answer: str, references: Sequence[str], details: Mapping[str, Any]) -> float:
    """1 if the written answer equals the reference."""
    written = mathvista_answer(answer, str(details["answer_type"]), details["precision"])
    return float(written.strip() in [reference.strip() for reference in references])


def levenshtein(one: str, other: str) -> int:
    """Number of insertions, deletions and substitutions from one text to the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1 - levenshtein(one, other) / longest if longest else 1.0


def _relaxed_equal(answer: str, reference: str, tolerance: float) -> bool:
    given, wanted = _number(answer), _number(reference)
    # Without a relative change from zero, texts are compared.
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= tolerance
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
