"""What a sample looks like in a shard and in a manifest: its parts as JSON.

A sample's JSON is `{"parts": [...]}` with, in their order, text parts `{"text": ..., "loss": true}` and media parts
`{"media": NAME, "modality": KIND, ...}`; further keys of a media part (for example `"rate": 50`) are attributes that
the modality reads. A plain WebDataset sample has a `.txt` beside its media instead: media first, then the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.data.types import DataError, MediaPart, Part, TextPart


def parse_parts(value: Any, where: str) -> list[Part]:
    """Read the `parts` of a sample.

    Raises:
        DataError: naming `where` (sample or line), the part and what is wrong with it.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `parts` must be a list of text and media parts.")
    parts: list[Part] = []
    for number, entry in enumerate(value):
        at = f"{where}: part {number}"
        if not isinstance(entry, dict) or ("text" in entry) == ("media" in entry):
            raise DataError(f"{at} must be an object with either `text` or `media`.")
        if "text" in entry:
            unknown = set(entry) - {"text", "loss"}
            if unknown or not isinstance(entry["text"], str) or not isinstance(entry.get("loss", True), bool):
                raise DataError(f"{at}: a text part has a string `text` and may have a boolean `loss`, no more.")
            parts.append(TextPart(entry["text"], entry.get("loss", True)))
            continue
        attributes = {key: item for key, item in entry.items() if key not in ("media", "modality")}
        if not isinstance(entry["media"], str) or not isinstance(entry.get("modality", ""), str):
            raise DataError(f"{at}: `media` and `modality` must be strings.")
        parts.append(MediaPart(entry["media"], entry.get("modality", ""), attributes))
    if not any(isinstance(part, TextPart) for part in parts):
        raise DataError(f"{where}: it has no text, so there is nothing to learn from it.")
    return parts


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with its line's name for messages; empty lines are passed over.

    Raises:
        DataError: naming the line that is no JSON object.
    """
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}).") from None
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: not a JSON object.")
            yield f"{path}:{number}", value


def parse_json(data: bytes, where: str) -> list[Part]:
    """Read a sample's JSON member.

    Raises:
        DataError: it is no such JSON.
    """
    try:
        value = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{where}: its .json is not readable JSON ({error}).") from None
    if not isinstance(value, dict) or "parts" not in value:
        raise DataError(f"{where}: its .json must be an object with `parts`.")
    return parse_parts(value["parts"], where)


def parse_text(data: bytes, where: str) -> TextPart:
    """Read a sample's .txt member.

    Raises:
        DataError: it is not UTF-8, or empty.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its .txt is not UTF-8 ({error}).") from None
    if not text.strip():
        raise DataError(f"{where}: its .txt is empty.")
    return TextPart(text)


def to_json(parts: Sequence[Part], media_names: Sequence[str]) -> bytes:
    """Write a sample's JSON member, its media items renamed to `media_names`."""
    names = iter(media_names)
    entries: list[Mapping[str, Any]] = []
    for part in parts:
        if isinstance(part, TextPart):
            entries.append({"text": part.text} if part.loss else {"text": part.text, "loss": False})
        else:
            entries.append({"media": next(names), "modality": part.modality, **part.attributes})
    return json.dumps({"parts": entries}, ensure_ascii=False).encode()
