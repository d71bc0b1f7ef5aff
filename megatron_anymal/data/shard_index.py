"""Shard index: byte range, token counts and media sizes of each sample.

The tables (data/index_format.py) are memory-mapped, so an index of a hundred million samples takes no memory and
planning a step reads only the rows of that step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Optional

import numpy as np

from megatron_anymal.config import LimitsConfig, StorageConfig
from megatron_anymal.data.codes import CodesKind
from megatron_anymal.data.content_parts import CODES_ENDING, media_part, name_modalities
from megatron_anymal.data.index_format import (
    BOUNDS,
    KEYS,
    MEDIA_ITEMS,
    READABLE,
    SAMPLE,
    SAMPLES,
    VERSION,
    IndexHeader,
)
from megatron_anymal.data.json_text import parse_json_text
from megatron_anymal.data.left_out import INDEX_FOLDER, LEDGER, LeftOut, read_ledger
from megatron_anymal.data.length_bounds import LengthBounds
from megatron_anymal.data.records import SAMPLE_KINDS, DataError, MediaPart, Part, Sample
from megatron_anymal.data.row_reader import RowReader
from megatron_anymal.data.samples import parse_sample, parse_text
from megatron_anymal.data.stored_shards import StoredShards
from megatron_anymal.object_storage.byte_ranges import ByteRange
from megatron_anymal.object_storage.remote_shards import RemoteShards

_REBUILD = "Rebuild it with `anymal prepare --rebuild --index-only`."


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
    """An opened index and its shards, on a local disk or an object store."""

    def __init__(self, folder: str, limits: Optional[LimitsConfig] = None, storage: Optional[StorageConfig] = None):
        """Open an index.

        Args:
            limits: maximum size of a member in bytes and maximum depth of a sample's JSON. None: the limits that the
                index was built with.
            storage: how a folder on an object store is read. None: the defaults.

        Raises:
            DataError: the index is missing, incomplete, empty, or has an unsupported version.
            StorageError: the object store, or the cache for its indexes, cannot be used.
        """
        self.folder = folder.rstrip("/")
        self._shards = StoredShards(self.folder, storage)
        self._fs, self._root = self._shards.fs, self._shards.root
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
        if body.get("version") not in READABLE:
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
        # Everything besides the shards that it was built from (IndexOptions.identity); empty likewise.
        self.options: Mapping[str, Any] = body.get("options", {})
        # Numbers of ledger entries by code; empty likewise.
        self.left_out_codes: Mapping[str, int] = body.get("left_out", {})
        # Numbers of samples and media items by kind, and samples per block of the bounds; empty likewise.
        self._counts: Mapping[str, Any] = body.get("counts", {})
        # SHA-256 of the rows, which have the checksums of all texts and media, and of the keys; empty likewise.
        self.content: str = body.get("content", "")
        self.limits = limits or _limits(body.get("limits", {}))
        self.samples, self.media = self._array(SAMPLES), self._array(MEDIA_ITEMS)
        if len(self.samples) == 0:
            raise DataError(f"The index in {folder!r} is empty: it contains no samples.")
        if len(self.samples) != body["samples"] or len(self.media) != body["media"]:
            raise self._incomplete()
        self._shards.open(dict(zip(self.header.shards, self.header.shard_bytes)))

    @property
    def remote(self) -> Optional[RemoteShards]:
        """The shards' folder on an object store; None if it is local."""
        return self._shards.remote

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, sample: int) -> str:
        """Key of a sample."""
        row = self.samples[sample]
        start = int(row["key_offset"])
        return self.keys_between(start, start + int(row["key_length"])).decode()

    def keys_between(self, start: int, stop: int) -> bytes:
        """Concatenated keys in a range of bytes."""
        return bytes(self._keys[start:stop])

    @cached_property
    def readers(self) -> tuple[RowReader, RowReader]:
        """Readers of scattered samples and media."""
        return RowReader(self.samples), RowReader(self.media)

    @property
    def key_bytes(self) -> int:
        """Length of all keys in bytes."""
        return len(self._keys)

    def kinds_used(self) -> set[str]:
        """Kinds of media in the index."""
        if self._counts:
            return set(self._counts["media"])
        return {self.header.kinds[k] for k in np.unique(self.media["kind"])}

    def sample_kinds(self) -> dict[str, int]:
        """Number of samples of each kind in the index."""
        if self._counts:
            return dict(self._counts["samples"])
        kinds, counts = np.unique(self._column(self.samples, "kind"), return_counts=True)
        return {SAMPLE_KINDS[kind]: int(count) for kind, count in zip(kinds, counts)}

    @cached_property
    def bounds(self) -> Optional[LengthBounds]:
        """Bounds on the lengths of samples; None for an index of an earlier version.

        Raises:
            DataError: they are incomplete.
        """
        if not self._counts:
            return None
        try:
            bounds = LengthBounds(np.array(self._array(BOUNDS)), int(self._counts["block"]))
        except FileNotFoundError:
            raise self._incomplete() from None
        if not bounds.cover(len(self)):
            raise self._incomplete()
        return bounds

    def lengths(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token counts of samples' documents, without media.

        Args:
            samples: [n] row numbers.

        Returns:
            Tokens and targets, both [n, 2] int64: for the only or chosen document, and for the rejected one (0 if there
            is none).
        """
        return self.lengths_in(self.readers[0].take(samples))

    def lengths_in(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`lengths` of samples whose rows have been read.

        Args:
            rows: [n] SAMPLE.

        Returns:
            Tokens and targets, both [n, 2] int64.
        """
        tokens, targets = (
            np.stack([self._column(rows, name) for name in names], axis=1).astype(np.int64)
            for names in (("tokens", "rejected_tokens"), ("targets", "rejected_targets"))
        )
        return tokens, targets

    def check_shards(self) -> None:
        """Check that every shard exists and has the indexed size.

        Raises:
            DataError: naming the first shard that is missing or has another size.
            StorageError: the object store cannot be used.
        """
        sizes = self._shards.sizes(self.header.shards)
        for name, size in zip(self.header.shards, self.header.shard_bytes):
            if name not in sizes:
                raise DataError(f"Shard {name!r} of {self.folder!r} is missing.")
            if sizes[name] != size:
                raise DataError(
                    f"Shard {name!r} of {self.folder!r} has {sizes[name]} bytes, but the index states {size}. "
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
            plain = [self._plain(name, kind) for name, kind in zip(names, kinds)]
            return Sample("parts", ([*plain, parse_text(data, where)],))
        read = parse_sample(parse_json_text(data, where, self.limits), where)
        if len(read.media) != len(kinds):
            raise DataError(f"{where}: its row in the index has {len(kinds)} media items. {_REBUILD}")
        named = zip(read.documents, read.item_numbers())
        return Sample(read.kind, tuple(self._completed(parts, [kinds[n] for n in own]) for parts, own in named))

    def read_file(self, name: str) -> bytes:
        """Content of a file of the index.

        Raises:
            FileNotFoundError: there is none, as in an index of an earlier version.
        """
        return bytes(self._fs.cat_file(self._inside(name)))

    def left_out(self) -> list[LeftOut]:
        """The ledger of everything that was left out when the index was built."""
        return read_ledger(self._fs, self._inside(LEDGER))

    def _named(self, names: str, number: int, where: str) -> str:
        """A kind or extension by its number in a row."""
        known: tuple[str, ...] = getattr(self.header, names)
        if number >= len(known):
            raise DataError(f"{where}: its row in the index is damaged. {_REBUILD}")
        return known[number]

    def _plain(self, extension: str, kind: str) -> MediaPart:
        """A media item of a sample with a .txt, which has no name there."""
        name = CODES_ENDING if CodesKind.parse(kind) else extension
        return media_part(name, kind, self._attributes(kind))

    def _attributes(self, kind: str) -> Mapping[str, Any]:
        return self.header.attributes.get(kind, {})

    def _completed(self, parts: Sequence[Part], kinds: Sequence[str]) -> list[Part]:
        """Add the kinds of the media parts and the default attributes of each kind."""
        named = name_modalities(parts, kinds)
        if not self.header.attributes:
            return named
        return [
            dataclasses.replace(part, attributes={**self._attributes(part.modality), **part.attributes})
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
            parts: the sample's media (`Sample.media`), or its first document.
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

    def byte_ranges(self, sample: int, media: Sequence[int]) -> list[ByteRange]:
        """The bytes of a sample's text and of some of its media items on the object store.

        Args:
            sample: row number of the sample.
            media: numbers of the items, counted over the sample's media.
        """
        assert self.remote is not None, "a local folder has no byte ranges to request"
        row, items = self.samples[sample], self.media_rows(sample)
        spans = [(row["text_offset"], row["text_length"]), *((items[n]["offset"], items[n]["length"]) for n in media)]
        shard = self.header.shards[int(row["shard"])]
        return [self.remote.byte_range(shard, int(offset), int(length)) for offset, length in spans]

    def request(self, ranges: Sequence[ByteRange]) -> None:
        """Start to read byte ranges from the object store; they stay in memory until `release`."""
        assert self.remote is not None, "a local folder has no byte ranges to request"
        self.remote.reads.request(ranges)

    def release(self, ranges: Sequence[ByteRange]) -> None:
        """Forget byte ranges that were requested."""
        assert self.remote is not None, "a local folder has no byte ranges to request"
        self.remote.reads.release(ranges)

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
        try:
            with suppress(ValueError):
                return np.load(self._inside(name), mmap_mode="r", allow_pickle=False)
            # An empty array cannot be memory-mapped.
            return np.load(self._inside(name), allow_pickle=False)
        except (EOFError, ValueError):
            raise self._incomplete() from None

    def _incomplete(self) -> DataError:
        return DataError(
            f"The index in {self.folder!r} is incomplete. Rebuild it with `anymal prepare --rebuild --index-only`."
        )

    @cached_property
    def _keys(self) -> Any:
        return np.memmap(self._inside(KEYS), dtype=np.uint8, mode="r")

    def _read(self, shard: int, offset: int, length: int, crc: int, where: str) -> bytes:
        return self._shards.read(self.header.shards[shard], offset, length, crc, where)


def _limits(given: Mapping[str, Any]) -> LimitsConfig:
    """The limits in an index.json. Unknown limits are ignored and missing ones keep their defaults."""
    known = {field.name for field in dataclasses.fields(LimitsConfig)}
    return LimitsConfig(**{name: value for name, value in given.items() if name in known})
