"""Indexing of WebDataset shards in one pass. Everything that cannot be used is named, and the counts of each shard are
checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.config import ConfigError, LimitsConfig
from megatron_anymal.data.codes import HASH_ATTRIBUTE, CodesKind, name_in_member, read_codes
from megatron_anymal.data.content_parts import CODES_ENDING, media_part
from megatron_anymal.data.filters import Facts, FilteredError, Rule, apply_rules, checked_together, learned_text
from megatron_anymal.data.json_text import parse_json_text
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.records import SAMPLE_KINDS, CodesPart, DataError, MediaPart, Part, Sample
from megatron_anymal.data.samples import is_sample, parse_sample, parse_text
from megatron_anymal.data.shard_rows import RowBuffer, ShardRows
from megatron_anymal.data.shard_samples import Group, MemberRule, SampleError, groups
from megatron_anymal.data.tar.byte_source import ByteSource, open_bytes
from megatron_anymal.data.tar.reader import TarError, TarMember, TarWalk
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.modalities import MODALITIES, kind_for_extension
from megatron_anymal.modalities.base import MediaError
from megatron_anymal.object_storage.client import file_system

# Increase it with every change to the rows that a shard yields: existing indexes are then rebuilt instead of extended.
RULES = 2
# Largest value of the column media_count.
MAX_MEDIA = 65_535
# Maximum number of values in the columns kind and extension of a shard.
MAX_NAMES = 255


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
    # Samples that one of these rules excludes are left out.
    filters: Sequence[Rule] = ()

    def identity(self, tokenizer: str) -> dict[str, Any]:
        """Everything besides a shard that determines its rows, as JSON values.

        Args:
            tokenizer: fingerprint of the tokenizer.

        Raises:
            ConfigError: a plug-in cannot be read.
        """
        try:
            contents = [Path(path).expanduser().read_bytes() for path in self.plugins]
        except OSError as error:
            raise ConfigError(
                f"model.plugins: {error.filename} is not an existing Python file. Correct the path."
            ) from None
        plugins = sorted(hashlib.sha256(content).hexdigest() for content in contents)
        body = {
            "rules": RULES,
            "tokenizer": tokenizer,
            "modalities": dict(self.kinds),
            "members": list(self.members),
            "attributes": {kind: dict(values) for kind, values in self.attributes.items()},
            "limits": dataclasses.asdict(self.limits),
            "text_only": self.text_only,
            "filters": [rule.identity for rule in self.filters],
            "plugins": plugins,
        }
        return dict(json.loads(json.dumps(body)))

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

    def probe(self, part: MediaPart, data: bytes, *, rejected: bool = False) -> tuple[str, float, float]:
        """Kind of a media item, and the two numbers of its modality's `probe`; of codes, see `_probe_codes`.

        Args:
            rejected: it belongs to the rejected answer of a preference pair alone.

        Raises:
            SampleError: the item cannot be used.
        """
        extension = part.media.lower().rpartition(".")[2]
        try:
            if isinstance(part, CodesPart):
                return self._probe_codes(part, data, rejected)
            kind = self.kind_of(part, extension)
            attributes = {**self.attributes.get(kind, {}), **part.attributes}
            first, second = map(float, MODALITIES[kind].probe(data, extension, attributes, self.limits))
        except MediaError as error:
            fix = "" if part.modality else " If it is not media, select the endings to use with --members."
            raise SampleError("media", f"its member {part.media!r} {error}.{fix}") from None
        # A plug-in may raise anything, and a single sample must not abort the indexing.
        except Exception as error:
            raise SampleError("media", f"its member {part.media!r} cannot be read: {error!r}.") from error
        return kind, first, second

    def _probe_codes(self, part: CodesPart, data: bytes, rejected: bool) -> tuple[str, float, float]:
        """Kind of an item of codes, its number of codes per codebook, and its highest code."""
        codes = read_codes(data)
        name = part.modality or name_in_member(part.media) or self.kinds.get(CODES_ENDING, "")
        stated = {**self.attributes.get(name, {}), **part.attributes}.get(HASH_ATTRIBUTE, "")
        kind = CodesKind.of(part, name, len(codes), stated, rejected=rejected)
        return str(kind), float(codes.shape[1]), float(codes.max())

    def facts(self, sample: Sample, media: Mapping[str, bytes], columns: Mapping[str, Any]) -> Facts:
        """What the filters look at in a sample that is to be packed.

        Args:
            media: content of each media item, by the name that the sample's parts state.
            columns: further values that its source lists.

        Raises:
            SampleError: a media item cannot be used.
        """
        sizes = [self.probe(part, media[part.media]) for part in sample.media]
        return Facts(learned_text(sample), sizes, columns, sample, lambda part: media[part.media])


@dataclass
class _Row:
    """The rows of one usable sample; see `RowBuffer.add`."""

    sample: tuple[int, ...]
    media: list[tuple[Any, ...]]
    used: int
    ignored: tuple[str, ...]
    # What the filters look at; None if there are none.
    facts: Optional[Facts]


@dataclass
class _ReadSample:
    """A sample of a shard, before the filters."""

    group: Group
    # None if the sample cannot be used.
    row: Optional[_Row]
    wrong: Optional[SampleError]
    # What was found between the sample before and this one.
    problems: list[LeftOut]


def index_shard(folder: str, name: str, tokenizer: Tokenizer, options: IndexOptions) -> ShardRows:
    """Index one shard. A shard that cannot be read at all yields no rows and one ledger entry with the reason.

    Raises:
        StorageError: the object store cannot be used, which does not make the shard unreadable.
    """
    fs, root = file_system(folder)
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
        buffer = RowBuffer()
        problems: list[LeftOut] = []
        samples = self._read_samples(groups(walk, rows.name, rows.members, problems), problems)
        for batch in checked_together(self._options.filters, samples, _media_bytes):
            self._filter(batch)
            for one in batch:
                rows.left_out += one.problems
                self._add(one, buffer)
        rows.left_out += problems
        recurring = buffer.recurring(entry.key for entry in rows.left_out if entry.key)
        for sample in recurring.values():
            occurrences = f"its key occurs in {sample.occurrences} places of the shard"
            fix = "Members of a sample must be consecutive, and keys must be unique."
            self._leave_out(sample.key, sample.start, sample.members, "duplicate_key", f"{occurrences}. {fix}")
        buffer.move_to(rows, recurring)
        rows.damaged_bytes = walk.bytes.damaged
        rows.members.check(rows.name)

    def _read_samples(self, all_groups: Iterable[Group], problems: list[LeftOut]) -> Iterator[_ReadSample]:
        """The samples of a shard; `problems` is emptied into them, so that the ledger keeps the order of the shard."""
        for group in all_groups:
            before = problems[:]
            problems.clear()
            try:
                yield _ReadSample(group, self._row(group), None, before)
            except SampleError as error:
                yield _ReadSample(group, None, error, before)

    def _filter(self, batch: Sequence[_ReadSample]) -> None:
        """Set `wrong` of the samples that a filter excludes."""
        checked = [(one, one.row.facts) for one in batch if one.row and one.row.facts]
        errors = apply_rules(self._options.filters, [facts for _, facts in checked])
        for (one, _), error in zip(checked, errors):
            one.wrong = error

    def _add(self, one: _ReadSample, buffer: RowBuffer) -> None:
        """Add a sample to the rows or to the ledger."""
        group, row, rows = one.group, one.row, self._rows
        if isinstance(one.wrong, FilteredError):
            rows.members.ignored["members of filtered samples"] += group.seen
            entry = LeftOut(rows.name, one.wrong.code, str(one.wrong), group.offset, group.key, rule=one.wrong.rule)
            rows.left_out.append(entry)
        elif one.wrong:
            self._leave_out(group.key, group.offset, group.seen, one.wrong.code, str(one.wrong))
        else:
            assert row is not None
            buffer.add(group.key, group.offset, row.sample, row.media, row.used, row.ignored)

    def _leave_out(self, key: str, offset: int, members: int, code: str, reason: str) -> None:
        self._rows.members.bad += members
        self._rows.left_out.append(LeftOut(self._rows.name, code, reason, offset, key))

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
        first = sum(isinstance(part, MediaPart) for part in sample.documents[0])
        for number, part in enumerate(sample.media):
            member = members.get(part.media.lower())
            if member is None:
                raise SampleError("missing_media", f"its JSON names {part.media!r}, which is not in the shard.")
            media.append(self._media_row(part, member, rejected=number >= first))
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
        facts = self._facts(group, sample, members, media) if self._options.filters else None
        row = (text.offset, text.size, zlib.crc32(data), is_json, SAMPLE_KINDS.index(sample.kind), *counts)
        return _Row(row, media, len(is_used), tuple(f".{ending}" for ending in unused), facts)

    def _facts(
        self, group: Group, sample: Sample, members: Mapping[str, TarMember], media: Sequence[tuple[Any, ...]]
    ) -> Facts:
        sizes = [(self._rows.kinds[row[3]], row[5], row[6]) for row in media]
        return Facts(learned_text(sample), sizes, self._columns(group), sample, partial(self._content, members))

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
            parts: list[Part] = [*(media_part(ending, "", {}) for ending in media), parse_text(data, "it")]
        except SampleError:
            raise
        except DataError as error:
            raise SampleError("torn" if group.torn else "text", str(error)) from None
        return text, data, False, Sample("parts", (parts,))

    def _columns(self, group: Group) -> dict[str, Any]:
        """The values in a sample's .json, which is its own or another tool's metadata."""
        member = group.members.get("json")
        if member is None or not any(rule.column for rule in self._options.filters):
            return {}
        try:
            value = parse_json_text(self._text(member), "its .json", self._options.limits)
        except DataError as error:
            raise SampleError("text", str(error)) from None
        return value if isinstance(value, dict) else {}

    def _content(self, members: Mapping[str, TarMember], part: MediaPart) -> bytes:
        member = members[part.media.lower()]
        return self._source.read_at(member.offset, member.size)

    def _text(self, member: TarMember) -> bytes:
        limit = self._options.limits.max_text_bytes
        if member.size > limit:
            reason = f"its {member.name!r} has {member.size} bytes, above data.limits.max_text_bytes={limit}."
            raise SampleError("limit", reason)
        return self._source.read_at(member.offset, member.size)

    def _media_row(self, part: MediaPart, member: TarMember, *, rejected: bool) -> tuple[Any, ...]:
        limit = self._options.limits.max_member_bytes
        if member.size > limit:
            reason = f"its {member.name!r} has {member.size} bytes, above data.limits.max_member_bytes={limit}."
            raise SampleError("limit", reason)
        data = self._source.read_at(member.offset, member.size)
        kind, first, second = self._options.probe(part, data, rejected=rejected)
        extension = part.media.lower().rpartition(".")[2]
        rows = self._rows
        return (
            member.offset,
            member.size,
            zlib.crc32(data),
            _number(rows.kinds, kind),
            _number(rows.extensions, extension),
            first,
            second,
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


def _media_bytes(one: _ReadSample) -> int:
    return sum(row[1] for row in one.row.media) if one.row else 0


def _number(names: list[str], name: str) -> int:
    """Position of a name in a list; a new name is appended.

    Raises:
        SampleError: the list is full.
    """
    if name not in names:
        if len(names) == MAX_NAMES:
            raise SampleError(
                "limit", f"it needs a {MAX_NAMES + 1}th kind or ending of media. Index it in another folder."
            )
        names.append(name)
    return names.index(name)
