"""Layouts of data sets: how to recognize one, which options apply to it, and how to open it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Optional, Union

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.source_records import Source
from megatron_anymal.data.tables import header_of

# Beginning of a file that is read to recognize it, in bytes, and entries of a folder.
_START, _ENTRIES = 2**20, 100_000
CAPTION_CHOICES = ("each", "first", "longest")


@dataclass(frozen=True)
class SourceOptions:
    """Options of `anymal prepare --from`."""

    # File or folder of the data set.
    path: Path
    # Folder of the media; None: the one of the data set's file.
    media: Optional[Path] = None
    # Which captions of a medium become samples: one of CAPTION_CHOICES; None: each.
    captions: Optional[str] = None
    # Role -> name of the column.
    columns: Mapping[str, str] = field(default_factory=dict)
    # Name of the split.
    split: Optional[str] = None
    # File of the texts of IMU recordings.
    narrations: Optional[Path] = None
    # Length in seconds of the window around a narration.
    window: Optional[float] = None
    # Sizes of texts.
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def given(self) -> list[str]:
        """Names of the options that are set and apply to some layouts only."""
        names = ("media", "captions", "split", "narrations", "window")
        return [name for name in names if getattr(self, name) is not None] + (["column"] if self.columns else [])

    @property
    def media_folder(self) -> Path:
        """Folder that the paths of media are relative to."""
        return self.media or (self.path if self.path.is_dir() else self.path.parent)


class FileSource(Source):
    """The samples that one file describes.

    Args:
        options: `path` is the file; `media` is the folder that its paths of media are relative to.
    """

    def __init__(self, options: SourceOptions):
        super().__init__(str(options.path), options.media_folder)
        self.options = options

    def files(self) -> Sequence[Path]:
        """The file."""
        return [self.options.path]

    def settings(self) -> Mapping[str, Any]:
        """Options that decide which samples there are: --captions and --column."""
        chosen = {"captions": self.options.captions, "columns": dict(self.options.columns)}
        return {name: value for name, value in chosen.items() if value}


@dataclass(frozen=True)
class ShardFolder:
    """Existing shards, which are indexed in place."""

    # Folder of the shards.
    folder: str
    # Endings of the members to use; empty: the default rule.
    members: Sequence[str] = ()
    # Notes for the user about samples that are not in the shards.
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Peek:
    """The beginning of a file, or the entries of a folder, as far as needed to recognize a layout."""

    # File or folder.
    path: Path
    # Entries of the folder; empty for a file.
    names: frozenset[str] = frozenset()
    # Beginning of the file.
    start: str = ""
    # First object of a .jsonl file or of a .json file that is an array; empty for others.
    first: Mapping[str, Any] = field(default_factory=dict)
    # First line of the file, split at the separator of a table.
    header: Sequence[str] = ()

    @staticmethod
    def of(path: Path) -> Peek:
        """Look at a file or folder."""
        if path.is_dir():
            with os.scandir(path) as entries:
                return Peek(path, frozenset(entry.name for entry in islice(entries, _ENTRIES)))
        with path.open("rb") as file:
            start = file.read(_START).decode("utf-8-sig", "replace")
        return Peek(path, start=start, first=_first_object(start), header=header_of(start.partition("\n")[0]))

    def has(self, ending: str) -> bool:
        """Whether the folder has a file with this ending."""
        return any(name.endswith(ending) for name in self.names)


@dataclass(frozen=True)
class SourceFormat:
    """A layout of a data set."""

    # Name on the command line.
    name: str
    # Description, for messages.
    what: str
    # Names of the fields of SourceOptions that apply to it.
    options: frozenset[str]
    # Whether a file or folder has this layout.
    recognizes: Callable[[Peek], bool]
    # Opens one that has.
    open: Callable[[SourceOptions], Union[Source, ShardFolder]]


def clean_key(number: int, stated: Any = None) -> str:
    """A key from a sample's position, which makes it unique, and the identifier that its source states."""
    text = re.sub(r"[^\w-]+", "_", str(stated)).strip("_")[:200] if stated not in (None, "") else ""
    return f"{number:09d}-{text}" if text else f"{number:09d}"


def chosen_captions(captions: Sequence[str], choice: Optional[str]) -> list[tuple[int, str]]:
    """The captions that become samples, each with its position; captions without text count as well.

    Args:
        choice: one of CAPTION_CHOICES; None: each.
    """
    numbered = list(enumerate(captions))
    if choice == "first":
        return numbered[:1]
    if choice == "longest":
        return [max(numbered, key=lambda pair: len(pair[1].strip()))] if numbered else []
    return numbered


def caption_parts(media: str, modality: str, caption: str) -> dict[str, Any]:
    """The JSON of a sample that is a media item and its caption, without white space at the caption's ends."""
    return {"parts": [{"media": media, "modality": modality}, {"text": caption.strip()}]}


def _first_object(start: str) -> Mapping[str, Any]:
    text = start.lstrip().removeprefix("[").lstrip()
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
