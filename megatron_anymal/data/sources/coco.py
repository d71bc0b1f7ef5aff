"""COCO's captions, such as captions_train2017.json: `images` with `id` and `file_name`, and `annotations` with
`image_id` and `caption`, several for an image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.data.source_records import Record
from megatron_anymal.data.sources.source_format import (
    FileSource,
    Peek,
    SourceFormat,
    caption_parts,
    chosen_captions,
    clean_key,
)


class CocoSource(FileSource):
    """The captions of a file in COCO's layout. The file is parsed whole, once.

    Args:
        options: `path` is the .json file, `media` the folder of the images, `captions` which captions to use.
    """

    def records(self) -> Iterator[Record]:
        """One sample per caption that is used, in the order of the images; images without a caption are left out.

        Raises:
            DataError: the file is not JSON in this layout.
        """
        images, captions = self._content
        number = 0
        for identifier, image in images.items():
            chosen = chosen_captions([text for _, text in captions.get(identifier, [])], self.options.captions)
            for position, caption in chosen:
                number += 1
                value = caption_parts(image["file_name"], "image", caption)
                key = clean_key(number, f"{identifier}-{captions[identifier][position][0]}")
                yield Record(f"{self.path}: image {identifier}", number, value, key, image)
            if not chosen:
                number += 1
                wrong = SampleError("text", "it has no caption.")
                yield Record(f"{self.path}: image {identifier}", number, key=clean_key(number, identifier), wrong=wrong)
        for identifier in captions.keys() - images.keys():
            for annotation, _ in captions[identifier]:
                number += 1
                wrong = SampleError("missing_media", f"its image {identifier} is not among `images`.")
                where = f"{self.path}: annotation {annotation}"
                yield Record(where, number, key=clean_key(number, f"{identifier}-{annotation}"), wrong=wrong)

    @cached_property
    def _content(self) -> tuple[dict[Any, dict[str, Any]], dict[Any, list[tuple[Any, str]]]]:
        """Images by identifier; identifier and text of the captions of each."""
        try:
            with self.options.path.open("rb") as file:
                content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: not JSON ({error}).") from None
        images = _rows(self.path, content, "images", {"id": (int, str), "file_name": (str,)})
        captions: dict[Any, list[tuple[Any, str]]] = {}
        columns: dict[str, tuple[type, ...]] = {"image_id": (int, str), "caption": (str, type(None))}
        for row in _rows(self.path, content, "annotations", columns):
            captions.setdefault(row["image_id"], []).append((row.get("id", ""), row["caption"] or ""))
        return {row["id"]: row for row in images}, captions


def _rows(path: str, content: Any, name: str, columns: Mapping[str, tuple[type, ...]]) -> list[dict[str, Any]]:
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: `{name}` must be a list of objects.")
    for number, row in enumerate(rows):
        if missing := [column for column in columns if column not in row]:
            hint = " This is not a file of captions: use captions_*.json." if missing[0] == "caption" else ""
            raise DataError(f"{path}: `{name}`[{number}] has no `{missing[0]}`.{hint}")
        for column, types in columns.items():
            if not isinstance(row[column], types):
                raise DataError(f"{path}: `{name}`[{number}] has the `{column}` {str(row[column])[:60]!r}.")
    return rows


def _recognizes(peek: Peek) -> bool:
    start = peek.start.lstrip()
    return (start.startswith("{") and '"images"' in start and '"file_name"' in start) or _is_captions(start)


def _is_captions(start: str) -> bool:
    return start.startswith("{") and '"annotations"' in start and '"image_id"' in start


FORMAT = SourceFormat(
    "coco", "captions_*.json: `images` and `annotations`", frozenset({"media", "captions"}), _recognizes, CocoSource
)
