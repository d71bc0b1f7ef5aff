"""Checks of what a server wrote: its form, and traces of the text that stood in for the media."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Optional

from megatron_anymal.synthesis.tasks import ConversationTask

Pair = tuple[str, str]

# A question or answer about the description instead of the media.
LEAKS = {
    "caption": r"\b(?:the|these|this|given|provided|per) captions?\b"
    r"|\bcaptions? (?:say|state|mention|describe|indicate)s?\b",
    "box": r"\bbounding[ -]box(?:es)?\b|\bcoordinates?\b",
    "description": r"\b(?:given|provided|textual|based on the) descriptions?\b"
    r"|\bdescriptions? (?:say|state|mention|suggest|indicate|do not|does not)s?\b",
    "given text": r"\b(?:provided|given) (?:text|information|context|details|list|account)\b|\btextual account\b",
    "object list": r"\bobjects? list\b|\blist of objects\b",
    "no media": r"\b(?:I|AI)\b[^.]{0,20} (?:can ?not|can't|unable to|do not|don't) "
    r"(?:actually )?(?:see|view|hear|watch)\b",
}
_LEAKS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in LEAKS.items()}


class InvalidAnswer(ValueError):
    """An answer that cannot become a conversation; the message is the reason."""


def response_format(task: ConversationTask) -> dict[str, Any]:
    """The `response_format` of a request: a JSON schema, for servers that can enforce one."""
    pair = {
        "type": "object",
        "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
        "required": ["question", "answer"],
        "additionalProperties": False,
    }
    pairs = {"type": "array", "items": pair, "minItems": task.min_pairs, "maxItems": task.max_pairs}
    schema = {
        "type": "object",
        "properties": {"conversation": pairs},
        "required": ["conversation"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "conversation", "strict": True, "schema": schema}}


def parse_answer(text: str, task: ConversationTask) -> list[Pair]:
    """Questions and answers from a reply: a JSON object, which may stand between other text.

    Raises:
        InvalidAnswer: there is no such object, or a conversation has another form or number of pairs.
    """
    value = _find_object(text)
    if value is None:
        raise InvalidAnswer("not JSON")
    turns = value["conversation"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InvalidAnswer("schema: `conversation` is not a list of objects")
    pairs = []
    for turn in turns:
        texts = [turn.get("question"), turn.get("answer")]
        if not all(isinstance(entry, str) and entry.strip() for entry in texts):
            raise InvalidAnswer("schema: a question or answer is missing or empty")
        if any(0xD800 <= ord(character) <= 0xDFFF for entry in texts for character in entry):
            raise InvalidAnswer("schema: half of a surrogate pair")
        pairs.append((texts[0].strip(), texts[1].strip()))
    if not task.min_pairs <= len(pairs) <= task.max_pairs:
        raise InvalidAnswer(f"schema: {len(pairs)} pairs, not {task.min_pairs} to {task.max_pairs}")
    if len({question.casefold() for question, _ in pairs}) < len(pairs):
        raise InvalidAnswer("repeated question")
    return pairs


def leak_of(pairs: Sequence[Pair]) -> Optional[str]:
    """Name of the first kind of wording in LEAKS that a conversation contains; None if it has none."""
    text = "\n".join(entry for pair in pairs for entry in pair)
    return next((name for name, pattern in _LEAKS.items() if pattern.search(text)), None)


def normalised(pairs: Sequence[Pair]) -> str:
    """What makes two conversations duplicates: their words, without case and punctuation."""
    return "\n".join(" ".join(re.findall(r"\w+", entry.casefold())) for pair in pairs for entry in pair)


def _find_object(text: str) -> Optional[dict[str, Any]]:
    """The first JSON object with `conversation` in a text."""
    decoder = json.JSONDecoder()
    for match in list(re.finditer(r"\{", text))[:200]:
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and "conversation" in value:
            return value
    return None
