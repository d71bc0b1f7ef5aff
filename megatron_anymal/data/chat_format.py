"""Conversations: converts JSON messages to documents in Llama 3's chat format.

A conversation is `{"messages": [{"role": "system" | "user" | "assistant", "content": TEXT or [parts]}, ...]}`. The
parts are those of data/content_parts.py without `loss`; assistant turns have media only as codes of the Llama's
vocabulary. A preference pair adds `"chosen"` and `"rejected"`, two answers to messages that end with a user turn. Each
answer is TEXT, a list of parts, or an assistant message.

A document is `<|begin_of_text|>`, then for each message

    <|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>

as in Llama 3's published template, with white space stripped from both ends of the content. White space inside the
content, next to media, is kept. Control tokens written in the content stay plain text. The document is tokenized as one
string, so the ids equal those that transformers produces with the published template. Loss targets are the contents of
assistant turns and their `<|eot_id|>`, never a header; in a preference pair, only those of the two answers. If a
tokenizer merges the header's line breaks with the content (Llama 3's never does), the merged token belongs to the
content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_anymal.data.content_parts import parse_part
from megatron_anymal.data.records import CodesPart, DataError, MediaPart, Part, Sample, TextPart

# The template's control tokens; the first one must be the tokenizer's begin token.
CHAT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BEGIN, START_HEADER, END_HEADER, END_TURN = CHAT_TOKENS
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn; the content of an assistant turn is text, and media as codes."""

    # system, user or assistant.
    role: str
    # Texts and media items, in order.
    content: tuple[Part, ...]


def parse_conversation(value: dict[str, Any], where: str) -> Sample:
    """Read a sample with `messages` and, for a preference pair, `chosen` and `rejected`.

    Raises:
        DataError: naming `where` (sample or line), the message, what is wrong with it and the fix.
    """
    messages = parse_messages(value["messages"], where)
    if "chosen" in value or "rejected" in value:
        return _parse_pair(messages, value, where)
    if all(message.role != "assistant" for message in messages):
        raise DataError(f"{where}: `messages` has no assistant turn, so there is nothing to learn from it. Add one.")
    if messages[-1].role != "assistant":
        raise DataError(
            f"{where}: `messages` ends with a {messages[-1].role} turn, which has no answer. Remove it, or add an "
            "assistant turn."
        )
    return Sample("messages", (lay_out(messages),))


def _parse_pair(messages: Sequence[Message], value: dict[str, Any], where: str) -> Sample:
    answers = []
    for name in ("chosen", "rejected"):
        if name not in value:
            raise DataError(
                f"{where}: a preference pair needs `chosen` and `rejected`, but `{name}` is missing. Add it."
            )
        answer = value[name]
        if isinstance(answer, dict):
            message = _parse_message(answer, f"{where}: `{name}`")
            if message.role != "assistant":
                raise DataError(f"{where}: `{name}` is a {message.role} turn. An answer's role is assistant.")
            answers.append(message)
        else:
            answers.append(Message("assistant", _content(answer, "assistant", f"{where}: `{name}`")))
    if messages[-1].role != "user":
        raise DataError(
            f"{where}: `messages` of a preference pair must end with the user turn to be answered, not with the "
            f"{messages[-1].role}'s."
        )
    if answers[0] == answers[1]:
        raise DataError(
            f"{where}: `chosen` and `rejected` are the same answer, so there is no preference. Remove the pair."
        )
    prompt = _turns(messages, learned=False)
    return Sample("preference", tuple([*prompt, *_turns([answer], learned=True)] for answer in answers))


def parse_messages(value: Any, where: str) -> list[Message]:
    """Parse `messages`.

    Raises:
        DataError: naming `where`, the message and what is wrong with it.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `messages` must be a list of messages with `role` and `content`.")
    messages = [_parse_message(entry, f"{where}: message {number}") for number, entry in enumerate(value)]
    for number, message in enumerate(messages):
        if number and message.role == "system":
            raise DataError(
                f"{where}: message {number} is a system turn. A conversation has at most one, and it comes first: put "
                "its text there."
            )
    return messages


def lay_out(messages: Sequence[Message]) -> list[Part]:
    """The parts of a complete conversation. Assistant answers and their end tokens are targets."""
    return _turns(messages, learned=True)


def open_prompt(messages: Sequence[Message]) -> list[Part]:
    """The parts of a conversation up to and including the assistant's header: an open document for generation."""
    return [*_turns(messages, learned=False), _header("assistant")]


def messages_of(opened: Sequence[Part]) -> list[Message] | None:
    """Recover the messages from the parts of `open_prompt` or `last_answer`; None if they are not an open
    conversation."""
    if not opened or _role_of(opened[0]) is None or _role_of(opened[-1]) != "assistant":
        return None
    messages: list[Message] = []
    for part in opened[:-1]:
        role = _role_of(part)
        if role is not None:
            messages.append(Message(role, ()))
        elif not _marks(part, END_TURN):
            content = TextPart(part.text) if isinstance(part, TextPart) else part
            messages[-1] = Message(messages[-1].role, (*messages[-1].content, content))
    return messages


def last_answer(document: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Split a conversation's document into the open document before its last answer, and the parts of that answer."""
    begin = max(position for position, part in enumerate(document) if _role_of(part) == "assistant") + 1
    return list(document[:begin]), list(document[begin:-1])


def _turns(messages: Sequence[Message], learned: bool) -> list[Part]:
    parts: list[Part] = []
    for message in messages:
        loss = learned and message.role == "assistant"
        parts.append(_header(message.role))
        parts += [_spoken(part, message.role, loss) for part in message.content]
        parts.append(TextPart(END_TURN, loss, control=True))
    return parts


def _spoken(part: Part, role: str, loss: bool) -> Part:
    """A part of a turn's content; media other than codes are never targets."""
    if isinstance(part, TextPart):
        return TextPart(part.text, loss)
    if isinstance(part, CodesPart):
        return dataclasses.replace(part, generated=role == "assistant", loss=loss)
    return part


def _header(role: str) -> TextPart:
    return TextPart(f"{START_HEADER}{role}{END_HEADER}\n\n", loss=False, control=True)


def _role_of(part: Part) -> str | None:
    """The role whose header this part is; None if it is not a header."""
    return next((role for role in ROLES if _marks(part, _header(role).text)), None)


def _marks(part: Part, text: str) -> bool:
    """Whether a part is this text of the chat template, rather than message content."""
    return isinstance(part, TextPart) and part.control and part.text == text


def _parse_message(entry: Any, at: str) -> Message:
    if not isinstance(entry, dict) or set(entry) != {"role", "content"}:
        raise DataError(f"{at} must be an object with `role` and `content` and no other keys.")
    if entry["role"] not in ROLES:
        raise DataError(f"{at} has the unknown role {entry['role']!r}. Name one of {', '.join(ROLES)}.")
    return Message(entry["role"], _content(entry["content"], entry["role"], at))


def _content(value: Any, role: str, at: str) -> tuple[Part, ...]:
    if isinstance(value, str):
        value = [{"text": value}]
    if not isinstance(value, list):
        raise DataError(f"{at}: `content` must be a string or a list of text and media parts.")
    parts = [parse_part(entry, f"{at}, part {number}") for number, entry in enumerate(value)]
    if any("loss" in entry for entry in value):
        raise DataError(f"{at}: a part has `loss`, but in a conversation the role decides it. Remove `loss`.")
    if role == "assistant" and any(isinstance(part, MediaPart) and not isinstance(part, CodesPart) for part in parts):
        raise DataError(
            f"{at} is an assistant turn with media, which cannot be targets unless they are codes. Move them to a user "
            "turn, or encode them: anymal prepare --encode."
        )
    content = _trimmed(parts)
    if not content:
        raise DataError(f"{at} has empty content. Remove the message, or add text.")
    return content


def _trimmed(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Join adjacent texts and strip white space from both ends."""
    joined: list[Part] = []
    for is_text, group in groupby(parts, lambda part: isinstance(part, TextPart)):
        run = list(group)
        joined += [TextPart("".join(part.text for part in run if isinstance(part, TextPart)))] if is_text else run
    if joined and isinstance(joined[0], TextPart):
        joined[0] = TextPart(joined[0].text.lstrip())
    if joined and isinstance(joined[-1], TextPart):
        joined[-1] = TextPart(joined[-1].text.rstrip())
    return tuple(part for part in joined if not (isinstance(part, TextPart) and not part.text))
