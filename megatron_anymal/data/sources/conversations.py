"""Conversations whose text has placeholders where the media belong, as LLaVA and LLaMA-Factory write them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_anymal.data.shard_samples import SampleError

KINDS = ("image", "video", "audio")
# Names of roles -> those of data/chat_format.py.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    "system": "system",
}
_PLACEHOLDER = re.compile(r"<(image|video|audio)>")


def turns_of(value: Any) -> list[tuple[str, Any]]:
    """Role and content of each turn; a turn has `from` and `value`, or `role` and `content`.

    Raises:
        SampleError: it is not a conversation, or has turns of other roles, such as tools.
    """
    if not isinstance(value, list) or not value:
        raise SampleError("text", "its conversation is not a list of turns.")
    turns = []
    for number, turn in enumerate(value):
        names = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
        if not isinstance(turn, dict) or not set(names) <= turn.keys():
            raise SampleError("text", f"its turn {number} has neither `from` and `value` nor `role` and `content`.")
        role = turn[names[0]]
        if not isinstance(role, str) or role not in ROLES:
            raise SampleError("text", f"its turn {number} has the role {role!r}; known: {', '.join(ROLES)}.")
        turns.append((ROLES[role], turn[names[1]]))
    return turns


def media_paths(value: Any, name: str) -> list[str]:
    """The paths in a sample's field, which may be one, a list, or empty.

    Raises:
        SampleError: it holds something else.
    """
    if value is None or value == "":
        return []
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) for path in paths):
        raise SampleError("text", f"its `{name}` must be a path or a list of paths.")
    return paths


def messages_of(turns: Sequence[tuple[str, Any]], media: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """The messages of a conversation, with the media in place of their placeholders.

    Args:
        turns: role and content: a text, or a list of parts in OpenAI's form, which may name media themselves.
        media: kind -> paths in the order of the placeholders. A kind that is not in it has no placeholders: `<video>`
            is then text.

    Raises:
        SampleError: the numbers of placeholders and media differ, or a content is neither text nor parts.
    """
    paths = {kind: list(names) for kind, names in media.items()}
    texts = [(role, _text(content, paths)) for role, content in turns]
    placeholders = [kind for _, text in texts for kind in _PLACEHOLDER.findall(text)]
    _check_counts(placeholders, paths)
    remaining = {kind: iter(names) for kind, names in paths.items()}
    messages = []
    for role, text in texts:
        content = list(_parts(text, remaining))
        only_text = all("text" in part for part in content)
        messages.append({"role": role, "content": text if only_text else content})
    return messages


def _check_counts(placeholders: Sequence[str], paths: Mapping[str, Sequence[str]]) -> None:
    for kind, names in paths.items():
        if placeholders.count(kind) != len(names):
            raise SampleError(
                "placeholders",
                f"its text has {placeholders.count(kind)} `<{kind}>`, but it has {len(names)} media of this kind.",
            )


def _parts(text: str, media: Mapping[str, Iterator[str]]) -> Iterator[dict[str, Any]]:
    """Texts and media of a turn, in order; placeholders of kinds without media stay text."""
    pieces = _PLACEHOLDER.split(text)
    texts, kinds = pieces[::2], pieces[1::2]
    pending = texts[0]
    for kind, following in zip(kinds, texts[1:]):
        if kind not in media:
            pending += f"<{kind}>{following}"
            continue
        if pending:
            yield {"text": pending}
        yield {"media": next(media[kind]), "modality": kind}
        pending = following
    if pending:
        yield {"text": pending}


def _text(content: Any, paths: dict[str, list[str]]) -> str:
    """The text of a turn with placeholders; media that the turn names itself are added to `paths`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise SampleError("text", "the content of a turn is neither a text nor a list of parts.")
    text = ""
    for part in content:
        kind = part.get("type", "").removesuffix("_url") if isinstance(part, dict) else ""
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in KINDS:
            text += f"<{kind}>"
            named = part.get(kind) or part.get(f"{kind}_url") or part.get("path")
            named = named.get("url") if isinstance(named, dict) else named
            known = paths.setdefault(kind, [])
            known += media_paths(named, kind)
        else:
            raise SampleError("text", f"a turn has a part of the type {kind!r}; known: text, {', '.join(KINDS)}.")
    return text
