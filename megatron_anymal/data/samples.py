"""JSON format of samples in shards and manifests.

There are three kinds:

- `{"parts": [...]}`: a sequence of text parts `{"text": ..., "loss": true}` and media parts `{"media": NAME,
  "modality": KIND, ...}`; further keys of a media part (for example `"rate": 50`) are attributes for the modality;
- `{"messages": [...]}`: a conversation, see data/chat_format.py;
- `{"messages": [...], "chosen": ..., "rejected": ...}`: a preference pair, see data/chat_format.py.

A plain WebDataset sample has media and a `.txt` instead: the media come first, then the text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.config import DEFAULT_LIMITS, LimitsConfig
from megatron_anymal.data.chat_format import parse_conversation
from megatron_anymal.data.content_parts import parse_parts
from megatron_anymal.data.json_text import parse_json_text
from megatron_anymal.data.records import DataError, Sample, TextPart

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_KEYS = ("parts", "messages", "chosen", "rejected")


def is_sample(value: Any) -> bool:
    """Whether the content of a .json member is a sample; other tools store metadata there."""
    return isinstance(value, dict) and ("parts" in value or "messages" in value)


def parse_sample(value: Any, where: str) -> Sample:
    """Read a sample of any kind.

    Raises:
        DataError: naming `where` (sample or line) and what is wrong.
    """
    if not is_sample(value):
        raise DataError(f"{where}: a sample is an object with `parts` or `messages`.")
    if "messages" not in value:
        return Sample("parts", (parse_parts(value["parts"], where),))
    if "parts" in value:
        raise DataError(f"{where}: it has both `parts` and `messages`. Keep one of them.")
    return parse_conversation(value, where)


def parse_text(data: bytes, where: str) -> TextPart:
    """Read a sample's .txt member, without a leading byte order mark.

    Raises:
        DataError: it is not UTF-8, or empty.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its .txt is not UTF-8 ({error}).") from None
    if not text.strip():
        raise DataError(f"{where}: its .txt is empty.")
    return TextPart(text)


def media_entries(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The media parts in a sample's JSON (as accepted by `parse_sample`), in document order."""
    if "parts" in value:
        lists = [value["parts"]]
    else:
        turns = [*value["messages"], *(value[name] for name in ("chosen", "rejected") if name in value)]
        lists = [turn["content"] if isinstance(turn, dict) else turn for turn in turns]
    for entries in lists:
        if isinstance(entries, list):
            yield from (entry for entry in entries if "media" in entry)


def to_json(value: dict[str, Any], media_names: Sequence[str]) -> bytes:
    """Serialize a sample's JSON member, with its media items renamed to `media_names`."""
    kept = copy.deepcopy({key: value[key] for key in _KEYS if key in value})
    for entry, name in zip(media_entries(kept), media_names, strict=True):
        entry["media"] = name
    return json.dumps(kept, ensure_ascii=False).encode()


def read_lines(path: Path, limits: LimitsConfig = DEFAULT_LIMITS) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with "FILE:LINE" for error messages; empty lines are skipped.

    Raises:
        DataError: a line is not a JSON object or exceeds a limit; the message names the line.
    """
    for number, line in raw_lines(path, limits):
        yield f"{path}:{number}", parse_line(line, f"{path}:{number}", limits)


def raw_lines(path: Path, limits: LimitsConfig = DEFAULT_LIMITS) -> Iterator[tuple[int, bytes]]:
    """The lines of a .jsonl file, each with its number, counted from 1; empty lines are skipped.

    Raises:
        DataError: the file is UTF-16, or a line exceeds a limit.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limits.max_text_bytes + 1):
            number += 1
            if number == 1 and line.startswith(UTF16_MARKS):
                raise DataError(f"{path}: the file is UTF-16. Save it as UTF-8.")
            if len(line) > limits.max_text_bytes:
                limit = f"data.limits.max_text_bytes={limits.max_text_bytes}"
                raise DataError(f"{path}:{number}: {len(line)} bytes, above {limit}.")
            if line.strip():
                yield number, line


def parse_line(line: bytes, where: str, limits: LimitsConfig = DEFAULT_LIMITS) -> dict[str, Any]:
    """The object of a line of a .jsonl file.

    Raises:
        DataError: it is not a JSON object or exceeds a limit; the message begins with `where`.
    """
    value = parse_json_text(line, where, limits)
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object.")
    return value
