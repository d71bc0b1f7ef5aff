"""Shard index: byte range, token counts and media sizes of each sample.

The index is a folder next to the shards:

    index.json      version, shards with their sizes, kinds of media, file extensions, tokenizer fingerprint, counts
    left_out.jsonl  every sample and member that is not in the index (data/left_out.py)
    samples.npy     one row per sample (SAMPLE)
    media.npy       one row per media item (MEDIA), in the order of the samples and of their parts
    keys.bin        concatenated sample keys, UTF-8

The arrays are memory-mapped, so an index of a hundred million samples takes no memory and planning a step reads only
the rows of that step.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Optional

import fsspec
import numpy as np

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.content_parts import name_modalities
from megatron_anymal.data.json_text import parse_json_text
from megatron_anymal.data.left_out import INDEX_FOLDER, LEDGER, LeftOut, read_ledger
from megatron_anymal.data.records import SAMPLE_KINDS, DataError, MediaPart, Part, Sample
from megatron_anymal.data.samples import parse_sample, parse_text
from megatron_anymal.data.tar.byte_source import is_local

VERSION = 3
# Version 1 has no conversations: its samples lack the columns kind, rejected_tokens and rejected_targets. Version 2 has
# no attributes; an index without attributes is still written as version 2, because it is identical.
_READABLE = (1, 2, VERSION)

SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        # The .txt or .json member: bytes [offset, offset + length) of the shard.
        ("text_offset", "<u8"),
        ("text_length", "<u4"),
        ("text_crc", "<u4"),
        ("text_is_json", "u1"),
        # Position in SAMPLE_KINDS.
        ("kind", "u1"),
        # Tokens without media, and target tokens; for a preference pair, those of the chosen document.
        ("tokens", "<u4"),
        ("targets", "<u4"),
        # The same for the rejected document of a preference pair; 0 for other samples.
        ("rejected_tokens", "<u4"),
        ("rejected_targets", "<u4"),
        ("media_start", "<u8"),
        ("media_count", "<u2"),
        ("key_offset", "<u8"),
        ("key_length", "<u2"),
    ]
)
MEDIA = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u8"),
        ("crc", "<u4"),
        ("kind", "u1"),
        ("extension", "u1"),
        # The result of the modality's `probe`: (width, height) or (duration, rate).
        ("size", "<f8", (2,)),
    ]
)


@dataclass(frozen=True)
class IndexHeader:
    """The metadata in index.json."""

    # File names of the shards.
    shards: tuple[str, ...]
    # Size of each shard in bytes.
    shard_bytes: tuple[int, ...]
    # Kinds of media; the media table holds positions in this list.
    kinds: tuple[str, ...]
    # File extensions of media; the media table holds positions in this list.
    extensions: tuple[str, ...]
    # Fingerprint of the tokenizer that counted the tokens.
    tokenizer: str
    # Version of the format as read; 0 for a new index.
    version: int = 0
    # Kind -> default attributes of its media; attributes of a media item take precedence.
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self, samples: int, media: int) -> str:
        """The identity of an index as JSON: everything that determines its samples and how they are read."""
        return json.dumps(self._body(samples, media), indent=1)

    def with_accounting(self, samples: int, media: int, accounting: Mapping[str, Any]) -> str:
        """The content of index.json: `to_json` plus the counts of everything that is not in the index."""
        return json.dumps({**self._body(samples, media), **accounting}, indent=1)

    def _body(self, samples: int, media: int) -> dict[str, Any]:
        shards = [{"name": n, "bytes": b} for n, b in zip(self.shards, self.shard_bytes)]
        attributes = {kind: dict(values) for kind, values in self.attributes.items() if values}
        return {
            "version": self.version or (VERSION if attributes else 2),
            "samples": samples,
            "media": media,
            "kinds": list(self.kinds),
            "extensions": list(self.extensions),
            "tokenizer": self.tokenizer,
            "shards": shards,
            **({"attributes": attributes} if attributes else {}),
        }


@dataclass(frozen=True)
class MediaBytes:
    """A media item as stored in a shard."""

    # The part of the sample that names the item.
    part: MediaPart
    # Content of the file.
    data: bytes
    # Lower case, no leading dot.
    extension: str


class ShardIndex:
    """An opened index and its shards, on a local disk or any file system supported by fsspec."""

    def __init__(self, folder: str, limits: Optional[LimitsConfig] = None):
        """Open an index.

        Args:
            limits: maximum size of a member in bytes and maximum depth of a sample's JSON. None: the limits that the
                index was built with.

        Raises:
            DataError: the index is missing, incomplete, empty, or has an unsupported version.
        """
        self.folder = folder.rstrip("/")
        self._fs, self._root = fsspec.core.url_to_fs(self.folder)
        self._local = is_local(self._fs)
        if not self._fs.isdir(self._root):
            raise DataError(f"There is no shard folder {folder!r}. Create it with `anymal prepare`.")
        try:
            body = json.loads(self._fs.cat_file(self._inside("index.json")))
        except FileNotFoundError:
            if not self._fs.glob(f"{self._root}/*.tar"):
                raise DataError(
                    f"{folder!r} holds neither an index nor .tar files. Create them with `anymal prepare`."
                ) from None
            raise DataError(
                f"{folder!r} has no index. Create one with `anymal prepare --index-only {folder}`."
            ) from None
        if body.get("version") not in _READABLE:
            raise DataError(f"The index in {folder!r} has version {body.get('version')}, not {VERSION}. Rebuild it.")
        self.header = IndexHeader(
            shards=tuple(entry["name"] for entry in body["shards"]),
            shard_bytes=tuple(entry["bytes"] for entry in body["shards"]),
            kinds=tuple(body["kinds"]),
            extensions=tuple(body["extensions"]),
            tokenizer=body["tokenizer"],
            version=body["version"],
            attributes=body.get("attributes", {}),
        )
        # Counts of members that were seen, used, ignored and bad; empty in an index of an earlier version.
        self.members: Mapping[str, Any] = body.get("members", {})
        self.limits = limits or _limits(body.get("limits", {}))
        self.samples, self.media = self._array("samples.npy"), self._array("media.npy")
        if len(self.samples) == 0:
            raise DataError(f"The index in {folder!r} is empty: it contains no samples.")
        if len(self.samples) != body["samples"] or len(self.media) != body["media"]:
            raise DataError(f"The index in {folder!r} is incomplete. Rebuild it with `anymal prepare --index-only`.")

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, sample: int) -> str:
        """Key of a sample."""
        row = self.samples[sample]
        start = int(row["key_offset"])
        return bytes(self._keys[start : start + int(row["key_length"])]).decode()

    def kinds_used(self) -> set[str]:
        """Kinds of media in the index."""
        return {self.header.kinds[k] for k in np.unique(self.media["kind"])}

    def sample_kinds(self) -> dict[str, int]:
        """Number of samples of each kind in the index."""
        kinds, counts = np.unique(self._column(self.samples, "kind"), return_counts=True)
        return {SAMPLE_KINDS[kind]: int(count) for kind, count in zip(kinds, counts)}

    def lengths(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token counts of samples' documents, without media.

        Args:
            samples: [n] row numbers.

        Returns:
            Tokens and targets, both [n, 2] int64: for the only or chosen document, and for the rejected one (0 if there
            is none).
        """
        rows = take_rows(self.samples, samples)
        tokens, targets = (
            np.stack([self._column(rows, name) for name in names], axis=1).astype(np.int64)
            for names in (("tokens", "rejected_tokens"), ("targets", "rejected_targets"))
        )
        return tokens, targets

    def check_shards(self) -> None:
        """Check that every shard exists and has the indexed size.

        Raises:
            DataError: naming the first shard that is missing or has another size.
        """
        for name, size in zip(self.header.shards, self.header.shard_bytes):
            path = f"{self._root}/{name}"
            if not self._fs.exists(path):
                raise DataError(f"Shard {name!r} of {self.folder!r} is missing.")
            if self._fs.size(path) != size:
                raise DataError(
                    f"Shard {name!r} of {self.folder!r} has {self._fs.size(path)} bytes, but the index states {size}. "
                    "Rebuild the index with `anymal prepare --index-only`."
                )

    def sample(self, sample: int) -> Sample:
        """Read a sample's documents from its text member; media parts carry their kind.

        Raises:
            DataError: the bytes cannot be read or differ from those that were indexed.
        """
        row = self.samples[sample]
        where = f"sample {self.key(sample)!r} of {self.folder!r}"
        length = int(row["text_length"])
        self._check_length(length, "max_text_bytes", where)
        data = self._read(int(row["shard"]), int(row["text_offset"]), length, int(row["text_crc"]), where)
        media = self.media_rows(sample)
        kinds = [self._named("kinds", m["kind"], where) for m in media]
        if not row["text_is_json"]:
            names = [self._named("extensions", m["extension"], where) for m in media]
            plain = [MediaPart(name, kind, self._attributes(kind)) for name, kind in zip(names, kinds)]
            return Sample("parts", ([*plain, parse_text(data, where)],))
        read = parse_sample(parse_json_text(data, where, self.limits), where)
        return Sample(read.kind, tuple(self._completed(parts, kinds) for parts in read.documents))

    def left_out(self) -> list[LeftOut]:
        """The ledger of everything that was left out when the index was built."""
        return read_ledger(self._fs, self._inside(LEDGER))

    def _named(self, names: str, number: int, where: str) -> str:
        """A kind or extension by its number in a row."""
        known: tuple[str, ...] = getattr(self.header, names)
        if number >= len(known):
            raise DataError(f"{where}: its row in the index is damaged. Rebuild it with `anymal prepare --index-only`.")
        return known[number]

    def _attributes(self, kind: str) -> Mapping[str, Any]:
        return self.header.attributes.get(kind, {})

    def _completed(self, parts: Sequence[Part], kinds: Sequence[str]) -> list[Part]:
        """Add the kinds of the media parts and the default attributes of each kind."""
        named = name_modalities(parts, kinds)
        if not self.header.attributes:
            return named
        return [
            MediaPart(part.media, part.modality, {**self._attributes(part.modality), **part.attributes})
            if isinstance(part, MediaPart)
            else part
            for part in named
        ]

    def _check_length(self, length: int, limit: str, where: str) -> None:
        most = getattr(self.limits, limit)
        if length > most:
            raise DataError(f"{where}: {length} bytes, above data.limits.{limit}={most}.")

    def parts(self, sample: int) -> list[Part]:
        """The parts of a sample that is not a conversation.

        Raises:
            DataError: the sample is a conversation, or cannot be read (see `sample`).
        """
        read = self.sample(sample)
        if read.kind != "parts":
            raise DataError(
                f"sample {self.key(sample)!r} of {self.folder!r} is a conversation, but samples with `parts` are "
                "needed here."
            )
        return read.documents[0]

    def read_media(self, sample: int, parts: Sequence[Part], wanted: Sequence[int]) -> list[MediaBytes]:
        """Read some of a sample's media items.

        Args:
            sample: row number of the sample.
            parts: one of the sample's documents.
            wanted: numbers of the items, counted over the sample's media.

        Raises:
            DataError: the bytes cannot be read or differ from those that were indexed.
        """
        items = [part for part in parts if isinstance(part, MediaPart)]
        rows, shard = self.media_rows(sample), int(self.samples[sample]["shard"])
        contents = []
        for number in wanted:
            row, part = rows[number], items[number]
            where = f"sample {self.key(sample)!r} of {self.folder!r}, media {part.media!r}"
            self._check_length(int(row["length"]), "max_member_bytes", where)
            data = self._read(shard, int(row["offset"]), int(row["length"]), int(row["crc"]), where)
            contents.append(MediaBytes(part, data, self._named("extensions", row["extension"], where)))
        return contents

    def media_rows(self, sample: int) -> np.ndarray:
        """[m] MEDIA: rows of a sample in the media table, in the order of its parts."""
        row = self.samples[sample]
        start = int(row["media_start"])
        return self.media[start : start + int(row["media_count"])]

    def _column(self, rows: np.ndarray, name: str) -> np.ndarray:
        return rows[name] if name in (rows.dtype.names or ()) else np.zeros(len(rows), SAMPLE[name])

    def _inside(self, name: str) -> str:
        return str(PurePosixPath(self._root) / INDEX_FOLDER / name)

    def _array(self, name: str) -> np.ndarray:
        if self._local:
            try:
                return np.load(self._inside(name), mmap_mode="r", allow_pickle=False)
            except ValueError:
                # An empty array cannot be memory-mapped.
                return np.load(self._inside(name), allow_pickle=False)
        with self._fs.open(self._inside(name), "rb") as file:
            return np.load(file, allow_pickle=False)

    @cached_property
    def _keys(self) -> Any:
        if self._local:
            return np.memmap(self._inside("keys.bin"), dtype=np.uint8, mode="r")
        return np.frombuffer(self._fs.cat_file(self._inside("keys.bin")), dtype=np.uint8)

    def _read(self, shard: int, offset: int, length: int, crc: int, where: str) -> bytes:
        name = self.header.shards[shard]
        try:
            data = self._fs.cat_file(f"{self._root}/{name}", start=offset, end=offset + length)
        except OSError as error:
            raise DataError(f"{where}: shard {name!r} cannot be read ({error}).") from None
        if len(data) != length or zlib.crc32(data) != crc:
            raise DataError(f"{where}: its bytes in shard {name!r} differ from those indexed (damaged shard?).")
        return data


def take_rows(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a table by their numbers; a view, without a copy of each, if they are consecutive.

    Args:
        table: [m] SAMPLE or MEDIA.
        rows: [n] row numbers.

    Returns:
        [n] of the table's type.

    Raises:
        IndexError: the table has no such row.
    """
    first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
    consecutive = last - first == len(rows) - 1 and bool((rows[1:] > rows[:-1]).all())
    return table[first : last + 1] if consecutive and first >= 0 and last < len(table) else table[rows]


def _limits(given: Mapping[str, Any]) -> LimitsConfig:
    """The limits in an index.json. Unknown limits are ignored and missing ones keep their defaults."""
    known = {field.name for field in dataclasses.fields(LimitsConfig)}
    return LimitsConfig(**{name: value for name, value in given.items() if name in known})
