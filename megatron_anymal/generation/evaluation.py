"""Accuracy of exact answers on prepared samples, also with media swapped between samples.

The last text or learned item of codes of a sample, or the last turn of a conversation, is the expected answer; the
model gets everything before it and answers, by default with the likeliest text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np

from megatron_anymal.config import StorageConfig
from megatron_anymal.data.chat_format import last_answer
from megatron_anymal.data.code_grammar import CodeItem
from megatron_anymal.data.codes import HASH_ATTRIBUTE, CodesKind, read_codes
from megatron_anymal.data.global_order import permute
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import CodesPart, DataError, MediaPart, Part, Sample, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.generation.answers import Reply, ReplyPart
from megatron_anymal.generation.generator import Generator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.modalities import MediaError


@dataclass(frozen=True)
class Question:
    """A sample to answer."""

    # Key of the sample.
    key: str
    # Everything before the expected answer.
    prompt: Prompt
    # The expected answer.
    expected: Reply

    @property
    def answer(self) -> str:
        """Text of the expected answer."""
        return self.expected.text.strip()

    @property
    def modality(self) -> str:
        """Kind of the first media item of the prompt, else of the answer; "text" if there is none."""
        asked = [part.modality for part in self.prompt.parts if isinstance(part, MediaPart)]
        return next((name or "codes" for name in (*asked, *(item.name for item in self.expected.items))), "text")


@dataclass(frozen=True)
class Score:
    """How well questions of one modality were answered."""

    # Number of exact answers.
    correct: int
    # Number of questions.
    samples: int
    # Share of the most frequent answer, which is the accuracy of guessing.
    chance: float
    # Number of answers in which the likeliest token always obeyed the grammar of codes (Reply.grammatical).
    grammatical: int = 0

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
        where = f"sample {index.key(number)!r} of {folder!r}"
        asked, answer = _split(index.sample(number), where)
        count = sum(isinstance(part, MediaPart) for part in (*asked, *answer))
        files = index.read_media(number, [*asked, *answer], range(count))
        media = iter([MediaFile(file.data, file.extension) for file in files])
        prompt = Prompt(asked, [next(media) for part in asked if isinstance(part, MediaPart)])
        expected = [
            part.text if isinstance(part, TextPart) else _item(part, next(media).data, where) for part in answer
        ]
        questions.append(Question(index.key(number), prompt, Reply.of_parts(expected)))
    return questions


def _item(part: Part, data: bytes, where: str) -> CodeItem:
    assert isinstance(part, CodesPart), "answers have no other media"
    try:
        return CodeItem(part.modality, read_codes(data))
    except MediaError as error:
        raise DataError(f"{where}: media {part.media!r} {error}.") from None


def _named(part: Part) -> Part:
    """A part of an index as prompts have it: codes with the name and the tokenizer that their kind states."""
    kind = CodesKind.parse(part.modality) if isinstance(part, CodesPart) else None
    if kind is None or not isinstance(part, CodesPart):
        return part
    return replace(part, modality=kind.name, attributes={**part.attributes, HASH_ATTRIBUTE: kind.tokenizer})


def _split(sample: Sample, where: str) -> tuple[list[Part], list[Part]]:
    """Split a sample into the question's content parts and those of the answer."""
    if sample.kind == "preference":
        raise DataError(
            f"{where} is a preference pair, which does not have a single answer. Name a folder of other samples."
        )
    document = list(map(_named, sample.documents[0]))
    if sample.kind == "messages":
        return last_answer(document)
    *asked, last = document
    if not isinstance(last, TextPart) and not (isinstance(last, CodesPart) and last.loss):
        raise DataError(f"{where} does not end with a text, or learned codes, to use as its answer.")
    return asked, [last]


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
    return Question(question.key, Prompt(parts, other.prompt.media), question.expected)


def score(questions: Sequence[Question], answers: Sequence[Reply]) -> dict[str, Score]:
    """Count exact answers by modality: equal texts, except for white space at both ends, and equal codes."""
    correct: Counter[str] = Counter()
    grammatical: Counter[str] = Counter()
    expected: dict[str, list[tuple[ReplyPart, ...]]] = {}
    for question, answer in zip(questions, answers):
        expected.setdefault(question.modality, []).append(_compared(question.expected))
        correct[question.modality] += is_exact(answer, question.expected)
        grammatical[question.modality] += answer.grammatical
    return {
        name: Score(correct[name], len(given), Counter(given).most_common(1)[0][1] / len(given), grammatical[name])
        for name, given in expected.items()
    }


def is_exact(given: Reply, expected: Reply) -> bool:
    """Whether two answers have the same texts, except for white space at both ends, and the same codes.

    Args:
        given: of a model.
        expected: of a sample, whose items may have further codebooks that the model does not use, and no name if the
            model has one kind only.
    """
    ours, theirs = _compared(given), _compared(expected)
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(given: ReplyPart, expected: ReplyPart) -> bool:
    if isinstance(given, str) or isinstance(expected, str):
        return given == expected
    codes = expected.codes[: len(given.codes)]
    return expected.name in ("", given.name) and np.array_equal(codes, given.codes)


def _compared(reply: Reply) -> tuple[ReplyPart, ...]:
    """The parts of an answer as they are compared."""
    stripped = [part.strip() if isinstance(part, str) else part for part in reply.parts]
    return tuple(part for part in stripped if part != "")


def described(reply: Reply) -> list[dict[str, Any]]:
    """The parts of an answer as JSON, with the codes of its items."""
    return [
        {"text": part} if isinstance(part, str) else {"modality": part.name, "codes": part.codes.tolist()}
        for part in reply.parts
    ]


def evaluate(
    generator: Generator, questions: Sequence[Question], sampling: Sampling, batch_size: int
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Answer the questions and score the answers. Collective.

    Returns:
        Scores by modality, and one row per question with its key, modality, expected and given answer, and why its
        query was rejected if it was.
    """
    answers = generator.replies([question.prompt for question in questions], sampling, batch_size)
    rows = [
        {"key": question.key, "modality": question.modality, **compared(question, answer)}
        for question, answer in zip(questions, answers)
    ]
    for number, rejection in generator.rejections.items():
        rows[number]["rejected"] = rejection.to_dict()
    return score(questions, answers), rows


def compared(question: Question, answer: Reply) -> dict[str, Any]:
    """Expected and given text of an answer, and the parts of those answers that have codes."""
    row: dict[str, Any] = {"expected": question.answer, "given": answer.text.strip()}
    for name, reply in (("expected_parts", question.expected), ("given_parts", answer)):
        if reply.items:
            row[name] = described(reply)
    return row
