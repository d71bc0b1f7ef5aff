"""Indexing of WebDataset shards in one pass. Everything that cannot be used is named, and the counts of each shard are
checked."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.json_text import parse_json_text
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.records import SAMPLE_KINDS, DataError, MediaPart, Part, Sample
from megatron_anymal.data.samples import is_sample, parse_sample, parse_text
from megatron_anymal.data.shard_index import MEDIA, SAMPLE
from megatron_anymal.data.shard_samples import Group, MemberCounts, MemberRule, SampleError, groups
from megatron_anymal.data.tar.byte_source import ByteSource, open_bytes
from megatron_anymal.data.tar.reader import TarError, TarMember, TarWalk
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.modalities import MODALITIES, kind_for_extension
from megatron_anymal.modalities.base import MediaError

# Largest value of the column media_count.
MAX_MEDIA = 65_535
# Columns of SAMPLE and MEDIA that depend on the shard alone, in the order of the rows built here.
_SAMPLE_COLUMNS = (
    *("text_offset", "text_length", "text_crc", "text_is_json", "kind"),
    *("tokens", "targets", "rejected_tokens", "rejected_targets", "media_count"),
)
_MEDIA_COLUMNS = ("offset", "length", "crc", "kind", "extension", "size")


@dataclass(frozen=True)
class IndexOptions:
    """Settings for reading samples from shards."""

    # Local folder of the HuggingFace tokenizer.
    tokenizer: str
    # File extension -> kind, for extensions that do not identify the kind.
    kinds: Mapping[str, str] = field(default_factory=dict)
    # Python files that register further modalities.
    plugins: Sequence[str] = ()
    # Patterns of the file endings to use; empty: the default rule of MemberRule.
    members: Sequence[str] = ()
    # Kind -> default attributes of its media, such as {"imu": {"rate": 200}}; those of a sample take precedence.
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # Maximum input sizes; see data.limits.
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    # Keep samples that have only a .txt even if other such samples have media.
    text_only: bool = False

    def rule(self) -> MemberRule:
        """The rule that selects the members of a sample."""
        known = frozenset(ending for kind in MODALITIES.values() for ending in kind.extensions)
        return MemberRule(tuple(self.members), known, frozenset(self.kinds))

    def kind_of(self, part: MediaPart, extension: str) -> str:
        """The modality kind of a media item.

        Raises:
            MediaError: no registered modality reads it.
        """
        # "0.thermal.npy", the first media item of a sample, is looked up as "thermal.npy".
        ending = re.sub(r"^\d+\.", "", part.media.lower())
        kind = part.modality or self.kinds.get(extension) or kind_for_extension(ending, MODALITIES)
        if kind not in MODALITIES:
            raise MediaError(f"has the unknown modality {kind!r}; known: {', '.join(sorted(MODALITIES))}")
        return kind


@dataclass
class ShardRows:
    """The rows that one shard adds to the index, and the entries that it leaves out."""

    # File name of the shard.
    name: str
    # Size of the shard in bytes.
    size: int
    # [n] SAMPLE; media_start and key_offset are relative to the shard.
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, SAMPLE))
    # [m] MEDIA; kinds and extensions are positions in the lists below.
    media: np.ndarray = field(default_factory=lambda: np.zeros(0, MEDIA))
    # Concatenated sample keys, UTF-8.
    keys: bytes = b""
    # Kinds of the shard's media.
    kinds: list[str] = field(default_factory=list)
    # File extensions of the shard's media.
    extensions: list[str] = field(default_factory=list)
    # Samples and members that are not in the rows, and why.
    left_out: list[LeftOut] = field(default_factory=list)
    # Counts of all members of the shard.
    members: MemberCounts = field(default_factory=MemberCounts)
    # Bytes that could not be read as members.
    damaged_bytes: int = 0

    def key(self, number: int) -> str:
        """Key of a sample."""
        start = int(self.samples["key_offset"][number])
        return self.keys[start : start + int(self.samples["key_length"][number])].decode()

    def without(self, numbers: Sequence[int], code: str, reason: str) -> ShardRows:
        """Move some samples, which must have no media, from the rows to `left_out`."""
        kept = np.ones(len(self.samples), bool)
        kept[list(numbers)] = False
        assert not self.samples["media_count"][~kept].any()
        left_out = [LeftOut(self.name, code, reason, int(self.samples["text_offset"][n]), self.key(n)) for n in numbers]
        members = MemberCounts()
        members.add(self.members)
        members.used, members.bad = members.used - len(numbers), members.bad + len(numbers)
        return ShardRows(
            self.name,
            self.size,
            self.samples[kept],
            self.media,
            self.keys,
            self.kinds,
            self.extensions,
            [*self.left_out, *left_out],
            members,
            self.damaged_bytes,
        )


@dataclass
class _Row:
    """The rows of one usable sample."""

    group: Group
    sample: tuple[int, ...]
    media: list[tuple[Any, ...]]
    used: int
    ignored: list[str]


def index_shard(folder: str, name: str, tokenizer: Tokenizer, options: IndexOptions) -> ShardRows:
    """Index one shard. A shard that cannot be read at all yields no rows and one ledger entry with the reason."""
    fs, root = fsspec.core.url_to_fs(folder)
    rows = ShardRows(name, 0)
    try:
        rows.size = int(fs.size(f"{root}/{name}"))
        with open_bytes(fs, f"{root}/{name}") as source:
            _Indexer(source, rows, tokenizer, options).run()
    except (TarError, OSError) as error:
        reason = str(error) if isinstance(error, TarError) else f"cannot be read ({error})"
        return ShardRows(name, rows.size, left_out=[LeftOut(name, "unreadable", reason)], damaged_bytes=rows.size)
    return rows


class _Indexer:
    """One pass over one shard."""

    def __init__(self, source: ByteSource, rows: ShardRows, tokenizer: Tokenizer, options: IndexOptions):
        self._source, self._rows, self._tokenizer, self._options = source, rows, tokenizer, options
        self._rule = options.rule()

    def run(self) -> None:
        """Fill the rows."""
        rows = self._rows
        walk = TarWalk(self._source, self._options.limits.max_text_bytes)
        good: list[_Row] = []
        seen: Counter[str] = Counter()
        for group in groups(walk, rows.name, rows.members, rows.left_out):
            seen[group.key] += 1
            try:
                good.append(self._row(group))
            except SampleError as error:
                self._leave_out(group, error.code, str(error))
        recurring = {key for key, count in seen.items() if count > 1}
        for row in good:
            if row.group.key in recurring:
                occurrences = f"its key occurs in {seen[row.group.key]} places of the shard"
                fix = "Members of a sample must be consecutive, and keys must be unique."
                self._leave_out(row.group, "duplicate_key", f"{occurrences}. {fix}")
                continue
            rows.members.used += row.used
            rows.members.ignored.update(row.ignored)
        rows.damaged_bytes = walk.bytes.damaged
        rows.members.check(rows.name)
        _fill(rows, [row for row in good if row.group.key not in recurring])

    def _leave_out(self, group: Group, code: str, reason: str) -> None:
        self._rows.members.bad += group.seen
        self._rows.left_out.append(LeftOut(self._rows.name, code, reason, group.offset, group.key))

    def _row(self, group: Group) -> _Row:
        """Index one sample.

        Raises:
            SampleError: the sample cannot be used.
        """
        if group.wrong:
            raise group.wrong
        members = self._rule.counted(group.members)
        text, data, is_json, sample = self._read(group, members)
        used = [text]
        media = []
        for part in sample.documents[0]:
            if isinstance(part, MediaPart):
                member = members.get(part.media.lower())
                if member is None:
                    raise SampleError("missing_media", f"its JSON names {part.media!r}, which is not in the shard.")
                media.append(self._media_row(part, member))
                used += [member]
        is_used = {member.offset for member in used}
        unused = [ending for ending, member in group.members.items() if member.offset not in is_used]
        for ending in unused:
            if is_json and ending in members and self._rule.is_media(ending):
                fix = "Name it there, or select the endings to use with --members."
                raise SampleError("unused_media", f"its JSON does not name its member {ending!r}. {fix}")
        counts = self._counts(sample)
        if len(media) > MAX_MEDIA:
            raise SampleError("limit", f"it has {len(media)} media items, above the index's maximum of {MAX_MEDIA}.")
        row = (text.offset, text.size, zlib.crc32(data), is_json, SAMPLE_KINDS.index(sample.kind), *counts, len(media))
        return _Row(group, row, media, len(is_used), [f".{ending}" for ending in unused])

    def _read(self, group: Group, members: Mapping[str, TarMember]) -> tuple[TarMember, bytes, bool, Sample]:
        """A sample's text member, its bytes, whether it is JSON, and its documents."""
        document, text = members.get("json"), members.get("txt")
        try:
            if document is not None:
                data = self._text(document)
                value = parse_json_text(data, "its .json", self._options.limits)
                if is_sample(value):
                    return document, data, True, parse_sample(value, "its .json")
            if group.torn:
                raise SampleError("torn", f"it may be incomplete: {group.torn}.")
            if text is None:
                raise SampleError("text", "it has neither a .txt nor a .json with `parts` or `messages`.")
            data = self._text(text)
            media = self._rule.media(members)
            parts: list[Part] = [*(MediaPart(ending, "") for ending in media), parse_text(data, "it")]
        except SampleError:
            raise
        except DataError as error:
            raise SampleError("torn" if group.torn else "text", str(error)) from None
        return text, data, False, Sample("parts", (parts,))

    def _text(self, member: TarMember) -> bytes:
        limit = self._options.limits.max_text_bytes
        if member.size > limit:
            reason = f"its {member.name!r} has {member.size} bytes, above data.limits.max_text_bytes={limit}."
            raise SampleError("limit", reason)
        return self._source.read_at(member.offset, member.size)

    def _media_row(self, part: MediaPart, member: TarMember) -> tuple[Any, ...]:
        limit = self._options.limits.max_member_bytes
        if member.size > limit:
            reason = f"its {member.name!r} has {member.size} bytes, above data.limits.max_member_bytes={limit}."
            raise SampleError("limit", reason)
        data = self._source.read_at(member.offset, member.size)
        extension = part.media.lower().rpartition(".")[2]
        try:
            kind = self._options.kind_of(part, extension)
            attributes = {**self._options.attributes.get(kind, {}), **part.attributes}
            size = MODALITIES[kind].probe(data, extension, attributes, self._options.limits)
        except MediaError as error:
            fix = "" if part.modality else " If it is not media, select the endings to use with --members."
            raise SampleError("media", f"its member {part.media!r} {error}.{fix}") from None
        # A plug-in may raise anything, and a single sample must not abort the indexing.
        except Exception as error:
            raise SampleError("media", f"its member {part.media!r} cannot be read: {error!r}.") from error
        rows = self._rows
        return (
            member.offset,
            member.size,
            zlib.crc32(data),
            _number(rows.kinds, kind),
            _number(rows.extensions, extension),
            size,
        )

    def _counts(self, sample: Sample) -> tuple[int, int, int, int]:
        """Tokens and targets of the first document, then those of the second (0 if there is none)."""
        try:
            counts = [self._tokenizer.count(parts, closed=sample.closed) for parts in sample.documents]
        except DataError as error:
            raise SampleError("text", str(error)) from None
        if not all(targets for _, targets in counts):
            raise SampleError("text", "none of its tokens is a target. Set `loss`: true in a text part.")
        (tokens, targets), (rejected_tokens, rejected_targets) = (*counts, (0, 0))[:2]
        return tokens, targets, rejected_tokens, rejected_targets


def _number(names: list[str], name: str) -> int:
    """Position of a name in a list; a new name is appended."""
    if name not in names:
        names.append(name)
    return names.index(name)


def _fill(rows: ShardRows, good: Sequence[_Row]) -> None:
    """Convert the rows to arrays."""
    rows.samples = np.zeros(len(good), SAMPLE)
    for name, column in zip(_SAMPLE_COLUMNS, zip(*(row.sample for row in good))):
        rows.samples[name] = column
    media = [item for row in good for item in row.media]
    rows.media = np.zeros(len(media), MEDIA)
    for name, column in zip(_MEDIA_COLUMNS, zip(*media)):
        rows.media[name] = column
    encoded = [row.group.key.encode() for row in good]
    rows.keys = b"".join(encoded)
    rows.samples["key_length"] = [len(key) for key in encoded]
    for start, length in (("key_offset", "key_length"), ("media_start", "media_count")):
        rows.samples[start] = _starts(rows.samples[length])


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Start offsets of consecutive ranges."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


@dataclass(frozen=True)
class IndexTables:
    """The combined index tables of all shards."""

    # [n] SAMPLE: one row per sample.
    samples: np.ndarray
    # [m] MEDIA: one row per media item.
    media: np.ndarray
    # Concatenated sample keys, UTF-8.
    keys: bytes
    # Kinds of media; the column `kind` of `media` holds positions in this list.
    kinds: list[str]
    # File extensions; the column `extension` of `media` holds positions in this list.
    extensions: list[str]


def assemble(shards: Sequence[ShardRows]) -> IndexTables:
    """Concatenate the rows of all shards, in order."""
    kinds = sorted({kind for shard in shards for kind in shard.kinds})
    extensions = sorted({extension for shard in shards for extension in shard.extensions})
    samples = np.concatenate([np.zeros(0, SAMPLE), *(shard.samples for shard in shards)])
    media = np.concatenate([np.zeros(0, MEDIA), *(shard.media for shard in shards)])
    per_shard = [len(shard.samples) for shard in shards]
    samples["shard"] = np.repeat(np.arange(len(shards)), per_shard)
    samples["key_offset"] += np.repeat(_starts(np.array([len(s.keys) for s in shards], int)), per_shard).astype("<u8")
    samples["media_start"] += np.repeat(_starts(np.array([len(s.media) for s in shards], int)), per_shard).astype("<u8")
    stop = 0
    for shard in shards:
        start, stop = stop, stop + len(shard.media)
        for column, local, together in (("kind", shard.kinds, kinds), ("extension", shard.extensions, extensions)):
            numbers = np.array([together.index(name) for name in local], np.uint8)
            if len(numbers):
                media[column][start:stop] = numbers[shard.media[column]]
    return IndexTables(samples, media, b"".join(shard.keys for shard in shards), kinds, extensions)
