"""What annotators compare: prompts, each with the answers of two models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_anymal.data.chat_format import Message, parse_messages
from megatron_anymal.data.content_parts import parse_parts
from megatron_anymal.data.prompt_encoder import open_parts
from megatron_anymal.data.records import DataError, MediaPart, Part, TextPart
from megatron_anymal.data.samples import read_lines
from megatron_anymal.modalities import MODALITIES, MediaError, kind_for_extension


@dataclass(frozen=True)
class ReadablePrompt:
    """A prompt as people read it."""

    # The line's `key`, or its number, counted from 0.
    key: str
    # The conversation up to the answer; a prompt of `parts` is one user turn.
    turns: tuple[Message, ...]
    # Folder that media paths are relative to.
    base: Path

    @property
    def media(self) -> list[MediaPart]:
        """The media items, in order, each with its kind."""
        return [part for turn in self.turns for part in turn.content if isinstance(part, MediaPart)]

    def messages(self, media_names: Sequence[str]) -> list[dict[str, Any]]:
        """The turns as JSON of a manifest, with the media items renamed."""
        names = iter(media_names)
        return [{"role": turn.role, "content": [_entry(part, names) for part in turn.content]} for turn in self.turns]


@dataclass(frozen=True)
class JudgedItem:
    """A question with two answers."""

    # What was asked.
    question: ReadablePrompt
    # The answer of model A.
    a: str
    # The answer of model B.
    b: str

    @property
    def fingerprint(self) -> str:
        """Hash of the question and its answers, by which a continued comparison notices that they changed."""
        question = self.question.messages([part.media for part in self.question.media])
        return hashlib.sha256(json.dumps([question, self.a, self.b]).encode()).hexdigest()


def read_questions(path: str) -> list[ReadablePrompt]:
    """Read a prompts file: a .jsonl of `parts` or `messages`, each with an optional `key`.

    Raises:
        DataError: the file is missing or empty, a line is not a prompt, a key occurs twice, or a media file is missing
            or has no kind.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"There is no prompts file {path!r}.")
    questions: dict[str, ReadablePrompt] = {}
    for number, (where, value) in enumerate(read_lines(file)):
        question = _question(value, number, where, file.parent)
        if question.key in questions:
            raise DataError(f"{where}: the key {question.key!r} occurs twice. Give each line a key of its own.")
        questions[question.key] = question
    if not questions:
        raise DataError(f"The prompts file {path!r} is empty. Write one object with `parts` or `messages` per line.")
    return list(questions.values())


def read_answers(path: str, questions: Sequence[ReadablePrompt]) -> list[str]:
    """Read the answers to questions, as `anymal generate --out` writes them.

    A line has `answer`, and `prompt`, the question's number counted from 0, or `key`.

    Raises:
        DataError: the file is missing, a line is not an answer, or a question has no answer or several.
    """
    if not Path(path).is_file():
        raise DataError(f"There is no answers file {path!r}.")
    numbers = {question.key: number for number, question in enumerate(questions)}
    answers: dict[int, str] = {}
    for where, value in read_lines(Path(path)):
        number = numbers.get(str(value["key"])) if "key" in value else value.get("prompt")
        if type(number) is not int or not 0 <= number < len(questions):
            raise DataError(
                f"{where}: it needs `key`, or `prompt` from 0 to {len(questions) - 1}, of a line in the prompts file."
            )
        if not isinstance(value.get("answer"), str):
            raise DataError(f"{where}: `answer` must be a string.")
        if number in answers:
            raise DataError(f"{where}: prompt {questions[number].key!r} has a second answer. Remove one.")
        answers[number] = value["answer"].strip()
    missing = [question.key for number, question in enumerate(questions) if number not in answers]
    if missing:
        raise DataError(f"{path!r} has no answer to {len(missing)} of the prompts, the first is {missing[0]!r}.")
    return [answers[number] for number in range(len(questions))]


def _question(value: Mapping[str, Any], number: int, where: str, base: Path) -> ReadablePrompt:
    open_parts(value, where)
    if "messages" in value:
        turns = parse_messages(value["messages"], where)
    else:
        turns = [Message("user", tuple(parse_parts(value["parts"], where)))]
    key = value.get("key", number)
    if isinstance(key, bool) or not isinstance(key, (str, int)) or key == "":
        raise DataError(f"{where}: the key {key!r} must be a string or an integer.")
    named = [Message(turn.role, tuple(_with_kind(part, where, base) for part in turn.content)) for turn in turns]
    return ReadablePrompt(str(key), tuple(named), base)


def _with_kind(part: Part, where: str, base: Path) -> Part:
    """Check that a media item's file exists, and name its kind."""
    if not isinstance(part, MediaPart):
        return part
    if not (base / part.media).is_file():
        raise DataError(f"{where}: there is no media file {str(base / part.media)!r}.")
    if part.modality:
        return part
    try:
        kind = kind_for_extension(Path(part.media).suffix, MODALITIES)
    except MediaError as error:
        raise DataError(f"{where}: {part.media!r}: {error}.") from None
    return MediaPart(part.media, kind, part.attributes)


def _entry(part: Part, names: Any) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"text": part.text}
    return {"media": next(names), "modality": part.modality, **part.attributes}
