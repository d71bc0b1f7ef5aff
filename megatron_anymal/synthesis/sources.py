"""Samples of a manifest as text that describes their media: captions, objects and boxes (paper, section 3.2)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_anymal.data.records import DataError
from megatron_anymal.data.samples import media_entries, read_lines


@dataclass(frozen=True)
class Box:
    """An object with its place in a picture."""

    # What it is.
    label: str
    # Left, top, right and bottom, in the manifest's unit.
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class SourceSample:
    """A sample to be turned into a conversation."""

    # Its key.
    key: str
    # Its media items as the manifest has them.
    media: tuple[dict[str, Any], ...]
    # Descriptions of the media.
    captions: tuple[str, ...]
    # Names of objects.
    objects: tuple[str, ...]
    # Objects with their places.
    boxes: tuple[Box, ...]

    def media_from(self, base: Path, folder: Path) -> list[dict[str, Any]]:
        """The media items with paths relative to another folder.

        Args:
            base: folder of the manifest.
            folder: the other one.
        """
        return [{**entry, "media": os.path.relpath(base / entry["media"], folder)} for entry in self.media]


def read_sources(path: str) -> list[SourceSample]:
    """Read a .jsonl manifest of media with captions.

    Captions are the texts that are learned, and the field `captions`; `objects` lists names, and `boxes` objects with
    `label` and `box`, four numbers.

    Raises:
        DataError: the file is missing or empty, or a line cannot be described: no media, no description, a field of
            another form, or a key that occurs twice.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".jsonl":
        raise DataError(f"--manifest {path!r} is not a .jsonl file that exists.")
    sources: dict[str, SourceSample] = {}
    for number, (where, value) in enumerate(read_lines(file), start=1):
        source = _source(value, number, where)
        if source.key in sources:
            raise DataError(f"{where}: the key {source.key!r} occurs twice. Give each line a key of its own.")
        missing = [entry["media"] for entry in source.media if not (file.parent / entry["media"]).is_file()]
        if missing:
            raise DataError(f"{where}: there is no media file {str(file.parent / missing[0])!r}.")
        sources[source.key] = source
    if not sources:
        raise DataError(f"The manifest {path!r} has no lines.")
    return list(sources.values())


def _source(value: Mapping[str, Any], number: int, where: str) -> SourceSample:
    if "media" in value:
        media = {k: v for k, v in value.items() if k not in ("key", "text", "captions", "objects", "boxes")}
        value = {**value, "parts": [media, {"text": value.get("text", "")}]}
    if not isinstance(value.get("parts"), list) or not all(isinstance(part, dict) for part in value["parts"]):
        raise DataError(f"{where}: a line to synthesize from has `parts`, or `media` and `text`.")
    media_items = tuple(media_entries({"parts": value["parts"]}))
    if not media_items or not all(isinstance(entry["media"], str) for entry in media_items):
        raise DataError(f"{where}: it has no media to ask about.")
    texts = [p["text"] for p in value["parts"] if isinstance(p.get("text"), str) and p.get("loss", True)]
    captions = _names([*texts, *_list(value, "captions", where)], "captions", where)
    objects = _names(_list(value, "objects", where), "objects", where)
    boxes = tuple(_box(entry, where) for entry in _list(value, "boxes", where))
    if not (captions or objects or boxes):
        raise DataError(f"{where}: it has no caption, `objects` or `boxes`, so nothing describes its media.")
    return SourceSample(str(value.get("key") or number), media_items, captions, objects, boxes)


def _list(value: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    entries = value.get(name, [])
    if not isinstance(entries, list):
        raise DataError(f"{where}: `{name}` must be a list.")
    return entries


def _names(entries: Sequence[Any], name: str, where: str) -> tuple[str, ...]:
    """Texts without repetitions and empty ones."""
    if not all(isinstance(entry, str) for entry in entries):
        raise DataError(f"{where}: `{name}` must be a list of strings.")
    return tuple(dict.fromkeys(text for entry in entries if (text := " ".join(entry.split()))))


def _box(entry: Any, where: str) -> Box:
    numbers = entry.get("box") if isinstance(entry, dict) and isinstance(entry.get("label"), str) else None
    if not isinstance(numbers, list) or [type(n) in (int, float) for n in numbers] != [True] * 4:
        raise DataError(f"{where}: a box is an object with `label` and `box`, four numbers.")
    return Box(entry["label"], tuple(map(float, numbers)))  # type: ignore[arg-type]
