"""Accuracy of exact answers on prepared samples, also with media swapped between samples.

The last text of a sample, or the last turn of a conversation, is the expected answer; the model gets everything before
it and answers, greedily by default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from megatron_anymal.config import StorageConfig
from megatron_anymal.data.chat_format import last_answer
from megatron_anymal.data.global_order import permute
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import CodesPart, DataError, MediaPart, Part, Sample, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.generation.generator import Generator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling


@dataclass(frozen=True)
class Question:
    """A sample to answer."""

    # Key of the sample.
    key: str
    # Everything before the expected answer.
    prompt: Prompt
    # The expected answer.
    answer: str

    @property
    def modality(self) -> str:
        """Kind of the first media item; "text" if there is none."""
        return next((part.modality for part in self.prompt.parts if isinstance(part, MediaPart)), "text")


@dataclass(frozen=True)
class Score:
    """How well questions of one modality were answered."""

    # Number of exact answers.
    correct: int
    # Number of questions.
    samples: int
    # Share of the most frequent answer, which is the accuracy of guessing.
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of exact answers."""
        return self.correct / self.samples


def read_questions(folder: str, limit: Optional[int] = None, storage: Optional[StorageConfig] = None) -> list[Question]:
    """Read the samples of a prepared folder as questions.

    Args:
        limit: number of samples to read. None: all.
        storage: how a folder on object storage is read. None: the defaults.

    Raises:
        DataError: the folder has no index, or a sample does not end with exactly one answer.
        StorageError: the object store cannot be used.
    """
    index = ShardIndex(folder, storage=storage)
    questions = []
    for number in range(min(len(index), limit or len(index))):
        asked, answer = _split(index.sample(number), f"sample {index.key(number)!r} of {folder!r}")
        count = sum(isinstance(part, MediaPart) for part in asked)
        media = [MediaFile(m.data, m.extension) for m in index.read_media(number, asked, range(count))]
        questions.append(Question(index.key(number), Prompt(asked, media), answer.strip()))
    return questions


def _split(sample: Sample, where: str) -> tuple[list[Part], str]:
    """Split a sample into the question's content parts and the answer."""
    if sample.kind == "preference":
        raise DataError(
            f"{where} is a preference pair, which does not have a single answer. Name a folder of other samples."
        )
    if any(isinstance(part, CodesPart) for part in sample.media):
        raise DataError(
            f"{where} has codes, with which questions cannot be asked. Name a folder without discrete media."
        )
    [document] = sample.documents
    if sample.kind == "messages":
        return last_answer(document)
    *asked, last = document
    if not isinstance(last, TextPart):
        raise DataError(f"{where} does not end with a text to use as its answer.")
    return asked, last.text


def permute_media(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """Give every question the media of another question with media of the same kinds.

    Questions that are still answered correctly did not depend on their media.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, question in enumerate(questions):
        kinds = tuple(p.modality for p in question.prompt.parts if isinstance(p, MediaPart))
        groups.setdefault(kinds, []).append(number)
    permuted = list(questions)
    for kinds, members in groups.items():
        if kinds and len(members) > 1:
            order = [members[i] for i in permute(np.arange(len(members)), len(members), seed)]
            for target, source in zip(order, [*order[1:], order[0]]):
                permuted[target] = _with_media(questions[target], questions[source])
    return permuted


def _with_media(question: Question, other: Question) -> Question:
    borrowed = iter(part for part in other.prompt.parts if isinstance(part, MediaPart))
    parts: list[Part] = [next(borrowed) if isinstance(part, MediaPart) else part for part in question.prompt.parts]
    return Question(question.key, Prompt(parts, other.prompt.media), question.answer)


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Score]:
    """Count exact answers by modality."""
    correct: Counter[str] = Counter()
    expected: dict[str, list[str]] = {}
    for question, answer in zip(questions, answers):
        expected.setdefault(question.modality, []).append(question.answer)
        correct[question.modality] += answer.strip() == question.answer
    return {
        name: Score(correct[name], len(given), Counter(given).most_common(1)[0][1] / len(given))
        for name, given in expected.items()
    }


def evaluate(
    generator: Generator, questions: Sequence[Question], sampling: Sampling, batch_size: int
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Answer the questions and score the answers. Collective.

    Returns:
        Scores by modality, and one row per question with its key, modality, expected and given answer, and why its
        query was rejected if it was.
    """
    answers = generator.answer([question.prompt for question in questions], sampling, batch_size)
    rows: list[dict[str, Any]] = [
        {"key": q.key, "modality": q.modality, "expected": q.answer, "given": answer.strip()}
        for q, answer in zip(questions, answers)
    ]
    for number, rejection in generator.rejections.items():
        rows[number]["rejected"] = rejection.to_dict()
    return score(questions, answers), rows
