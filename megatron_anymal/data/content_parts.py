"""Parsing of text and media parts, the JSON building blocks of samples and conversation turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from megatron_anymal.data.records import CodesPart, DataError, DocumentPart, MediaPart, Part, TextPart, TokensPart

# A media item whose name ends in this is codes of the Llama's vocabulary.
CODES_ENDING = "codes.npy"


def is_codes(name: str) -> bool:
    """Whether a media item is codes, by the name of its file or member: codes.npy or ANYTHING.codes.npy."""
    return f".{name.lower().rpartition('/')[2]}".endswith(f".{CODES_ENDING}")


def parse_part(entry: Any, at: str) -> Part:
    """Parse one part.

    Raises:
        DataError: naming `at` (the location of the part) and what is wrong with it.
    """
    if not isinstance(entry, dict) or ("text" in entry) == ("media" in entry):
        raise DataError(f"{at} must be an object with either `text` or `media`.")
    if "text" in entry:
        unknown = set(entry) - {"text", "loss"}
        if unknown or not isinstance(entry["text"], str) or not isinstance(entry.get("loss", True), bool):
            raise DataError(f"{at}: a text part has a string `text`, optionally a boolean `loss`, and no other keys.")
        return TextPart(entry["text"], entry.get("loss", True))
    attributes = {key: item for key, item in entry.items() if key not in ("media", "modality")}
    name, modality = entry["media"], entry.get("modality", "")
    if not isinstance(name, str) or not isinstance(modality, str):
        raise DataError(f"{at}: `media` and `modality` must be strings.")
    part = media_part(name, modality, attributes)
    if not isinstance(part, CodesPart):
        return part
    loss = attributes.pop("loss", False)
    if not isinstance(loss, bool):
        raise DataError(f"{at}: the `loss` of codes must be true or false.")
    return dataclasses.replace(part, generated=loss, loss=loss)


def media_part(name: str, modality: str, attributes: Mapping[str, Any]) -> MediaPart:
    """The part of a media item: a CodesPart, not a target, if its name is that of a file of codes; else a MediaPart."""
    return (CodesPart if is_codes(name) else MediaPart)(name, modality, attributes)


def parse_parts(value: Any, where: str) -> list[Part]:
    """Parse the `parts` of a sample.

    Raises:
        DataError: naming `where` (sample or line), the part and what is wrong with it.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `parts` must be a list of text and media parts.")
    parts = [parse_part(entry, f"{where}: part {number}") for number, entry in enumerate(value)]
    if not any(isinstance(part, TextPart) or (isinstance(part, CodesPart) and part.loss) for part in parts):
        raise DataError(f"{where}: it has no text, so there is nothing to learn from it.")
    return parts


def name_modalities(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """Set the modalities of the media parts to `names`, in order."""
    remaining = iter(names)
    return [
        dataclasses.replace(part, modality=next(remaining)) if isinstance(part, MediaPart) else part for part in parts
    ]


def with_tokens(parts: Sequence[Part], tokens: Sequence[Optional[tuple[int, ...]]]) -> list[DocumentPart]:
    """Replace codes by their token ids.

    Args:
        tokens: for each media part, in order, its token ids; None for one that is not codes.
    """
    remaining = iter(tokens)
    return [
        TokensPart(ids, part.loss)
        if isinstance(part, MediaPart) and (ids := next(remaining)) is not None and isinstance(part, CodesPart)
        else part
        for part in parts
    ]
