"""Rendering of conversations as one string, the form that transformers passes around, and parsing back to parts.

A rendered conversation begins with the begin token and a turn header; each media item is represented by one placeholder
of its modality. Only in such a string are control tokens interpreted; any other text is literal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_anymal.data.chat_format import BEGIN, START_HEADER
from megatron_anymal.data.records import DataError, MediaPart, Part, TextPart


def render(parts: Sequence[Part], placeholders: Mapping[str, str], control: Mapping[str, int]) -> str:
    """Render a conversation as a string.

    Args:
        parts: content parts, laid out by data/chat_format.py.
        placeholders: kind of media -> its placeholder token.
        control: control tokens of the tokenizer.

    Raises:
        DataError: an unknown kind, or a text that holds a control token, which would become a real one in a string.
    """
    out = [BEGIN]
    for part in parts:
        if isinstance(part, MediaPart):
            if part.modality not in placeholders:
                known = ", ".join(sorted(placeholders)) or "none"
                raise DataError(f"The model has no modality {part.modality!r}; it has: {known}.")
            out.append(placeholders[part.modality])
            continue
        written = [] if part.control else [token for token in control if token in part.text]
        if written:
            raise DataError(
                f"A message holds {written[0]!r} as text, which in a string would become the token itself. Use "
                "apply_chat_template with tokenize=True, which keeps it as text."
            )
        out.append(part.text)
    return "".join(out)


def is_rendered(text: str) -> bool:
    """Whether a text is a conversation rendered by `render`."""
    return text.startswith(BEGIN + START_HEADER)


def parts_of(text: str, placeholders: Mapping[str, str], media: Sequence[MediaPart]) -> list[Part]:
    """Parse a rendered conversation into parts, replacing each placeholder by the next item of its kind.

    Raises:
        DataError: the number of items of a kind differs from the number of its placeholders.
    """
    kinds = {token: kind for kind, token in placeholders.items()}
    waiting = {kind: [item for item in media if item.modality == kind] for kind in placeholders}
    for kind, token in placeholders.items():
        if text.count(token) != len(waiting[kind]):
            raise DataError(
                f"The text holds {text.count(token)} placeholders of {kind} ({token}), but {len(waiting[kind])} such "
                "items are given. Pass the same number, in order."
            )
    pattern = "|".join(re.escape(token) for token in kinds) or "(?!)"
    parts: list[Part] = []
    for piece in re.split(f"({pattern})", text.removeprefix(BEGIN)):
        if piece in kinds:
            parts.append(waiting[kinds[piece]].pop(0))
        elif piece:
            parts.append(TextPart(piece, control=True))
    return parts


def without_items(message: Any) -> Any:
    """Reduce the media items of a message to their kinds, for rendering.

    Raises:
        DataError: a media item without a kind.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), (list, tuple)):
        return message
    return {**message, "content": [_marked(part) for part in message["content"]]}


def _marked(part: Any) -> Any:
    if not isinstance(part, Mapping) or "text" in part:
        return {key: value for key, value in part.items() if key != "type"} if isinstance(part, Mapping) else part
    kind = part.get("modality", part.get("type"))
    if not isinstance(kind, str) or kind == "media":
        raise DataError("A media item in a message to be rendered as a string needs its kind, as `type` or `modality`.")
    return {"media": kind, "modality": kind}
