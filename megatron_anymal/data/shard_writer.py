"""Packing of a source's samples into WebDataset shards: the one writer of manifests and of data sets."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Optional

from megatron_anymal.config import DEFAULT_LIMITS, LimitsConfig
from megatron_anymal.data.filters import Facts, FilteredError, apply_rules, checked_together
from megatron_anymal.data.left_out import INDEX_FOLDER, REFUSED_LEDGER, LeftOut, by_rule, to_line
from megatron_anymal.data.packing_journal import PackedShard, PackingJournal, continues, is_unfinished
from megatron_anymal.data.records import CodesPart, DataError, Sample, TextPart
from megatron_anymal.data.samples import media_entries, parse_sample, to_json
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.data.source_records import Record, Source
from megatron_anymal.telemetry import Progress

if TYPE_CHECKING:
    from megatron_anymal.data.index_builder import IndexOptions
    from megatron_anymal.data.media_encoding import MediaEncoder


def pack(
    source: Source,
    out: str,
    samples_per_shard: int = 2000,
    overwrite: bool = False,
    max_bad_share: float = 0.01,
    limits: LimitsConfig = DEFAULT_LIMITS,
    filtering: Optional[IndexOptions] = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    encoder: Optional[MediaEncoder] = None,
) -> None:
    """Pack a source's samples into shards; those that cannot be used are left out, and each is named in the ledger.

    The source is read twice: once to check and count all of it, once to pack it. A packing that was interrupted
    continues with its first unfinished shard if it is started again with the same source and options.

    Args:
        samples_per_shard: samples of the source per shard, those left out included.
        max_bad_share: maximum share of samples that may be left out.
        filtering: its filters leave samples out. None: there are none.
        settings: the options that `filtering` and `encoder` depend on.
        encoder: encodes media as codes.

    Raises:
        DataError: the folder holds shards, the source has no samples or a key twice, or more is left out than allowed.
    """
    folder = Path(out)
    holds_shards = not overwrite and any(folder.glob("*.tar"))
    if holds_shards and not is_unfinished(folder):
        raise _holds_shards(out)
    total = source.count()
    if not total:
        raise DataError(f"{source.path!r} has no lines or samples.")
    header = packing_header(source, total, packing_options(samples_per_shard, limits, settings))
    if holds_shards and not continues(folder, header):
        raise _holds_shards(out)
    folder.mkdir(parents=True, exist_ok=True)
    journal = PackingJournal(folder, header)
    packer = _Packer(source, journal, total, max_bad_share, SampleWriter(source, limits, filtering, encoder))
    try:
        packer.run(samples_per_shard)
    except DataError:
        journal.discard()
        packer.write_refused(folder / INDEX_FOLDER)
        raise
    journal.complete()
    print(packer.summary())


def packing_options(samples_per_shard: int, limits: LimitsConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options that packed shards depend on, as JSON values.

    Args:
        settings: the options that the filters depend on.
    """
    return {"limits": dict(vars(limits)), "samples_per_shard": samples_per_shard, **settings}


def packing_header(source: Source, samples: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of a packing's journal.

    Args:
        samples: number of samples of the source.
        options: `packing_options`.
    """
    return {"source": source.path, "samples": samples, "fingerprint": source.fingerprint(options)}


def shard_name(number: int) -> str:
    """File name of the shard of a stretch of the source, counted from 0."""
    return f"shard-{number:06d}.tar"


def _holds_shards(out: str) -> DataError:
    return DataError(
        f"{out!r} already holds shards. Name another folder, add --overwrite, or index them: --index-only {out}."
    )


@dataclass
class _OpenedSample:
    """A sample before it is written."""

    record: Record
    key: str
    # Why it cannot be used; None if it can.
    wrong: Optional[SampleError] = None
    # Its JSON, and the tokenizer's name for each of its media to be encoded.
    value: dict[str, Any] = field(default_factory=dict)
    tokenizers: Sequence[str] = ()
    # Ending and content of each media item.
    media: Sequence[tuple[str, bytes]] = ()
    # What the filters look at; None if there are none.
    facts: Optional[Facts] = None

    @property
    def media_bytes(self) -> int:
        return sum(len(data) for _, data in self.media)


class SampleWriter:
    """Writes samples of a source into shards; all of them have keys of their own."""

    def __init__(
        self,
        source: Source,
        limits: LimitsConfig,
        filtering: Optional[IndexOptions],
        encoder: Optional[MediaEncoder] = None,
    ):
        """Nothing is read or written yet.

        Args:
            source: of the samples.
            limits: `data.limits`.
            filtering: its filters leave samples out. None: there are none.
            encoder: encodes media as codes.
        """
        self._encoder = encoder
        self._source, self._limits, self._filtering = source, limits, filtering
        self._keys: set[str] = set()
        # Hashes of the paths of media files, and how often one was used again.
        self._files: set[int] = set()
        self.reused = 0

    def write(
        self, number: int, path: Path, records: Iterable[Record], report: Callable[[Optional[LeftOut]], None]
    ) -> PackedShard:
        """Write the shard of a stretch of the source; there is no file if none of its samples can be used.

        Args:
            number: of the stretch, from 0.
            path: the file to write.
            report: called after each sample; None for one that is in the shard.

        Raises:
            DataError: a key occurs twice, or is not valid.
        """
        import webdataset

        left_out: list[LeftOut] = []
        samples = 0
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for one in self._checked(records):
                try:
                    writer.write(self._members(one))
                    samples += 1
                    report(None)
                except SampleError as error:
                    rule = error.rule if isinstance(error, FilteredError) else ""
                    where = one.record.where
                    left_out.append(LeftOut("", error.code, str(error), key=one.key, source=where, rule=rule))
                    report(left_out[-1])
        if not samples:
            path.unlink()
            return PackedShard(number, "", 0, 0, left_out)
        _flush(path)
        return PackedShard(number, shard_name(number), path.stat().st_size, samples, left_out)

    def require_new_keys(self, records: Iterable[Record]) -> None:
        """Check the keys of samples that are in a shard already.

        Raises:
            DataError: a key occurs twice, or is not valid.
        """
        for record in records:
            self._key(record)

    def _key(self, record: Record) -> str:
        """The key of a record, which must not have occurred before."""
        key = record.shard_key()
        if key in self._keys:
            raise DataError(f"{record.where}: the key {key!r} occurs twice. Give each sample a key of its own.")
        self._keys.add(key)
        return key

    def _checked(self, records: Iterable[Record]) -> Iterator[_OpenedSample]:
        """Open samples, in order, and apply the filters."""
        rules = self._filtering.filters if self._filtering else ()
        for group in checked_together(rules, map(self._open, records), lambda one: one.media_bytes):
            checked = [(one, one.facts) for one in group if one.facts]
            for (one, _), error in zip(checked, apply_rules(rules, [facts for _, facts in checked])):
                one.wrong = error
            yield from group

    def _open(self, record: Record) -> _OpenedSample:
        opened = _OpenedSample(record, self._key(record), record.wrong)
        if opened.wrong:
            return opened
        encoder = self._encoder
        try:
            opened.value, opened.tokenizers = encoder.named(record.value) if encoder else (record.value, ())
            parsed = _parse(opened.value)
            opened.media = list(self._media(record))
            if self._filtering:
                names = [entry["media"] for entry in media_entries(record.value)]
                seen = encoder.unencoded(parsed, record.value) if encoder else parsed
                contents = dict(zip(names, (data for _, data in opened.media)))
                opened.facts = self._filtering.facts(seen, contents, record.columns)
        except SampleError as error:
            opened.wrong = error
        return opened

    def _members(self, one: _OpenedSample) -> dict[str, Any]:
        """The members of a sample.

        Raises:
            SampleError: it cannot be used, or a filter excludes it.
        """
        if one.wrong:
            raise one.wrong
        media = self._encoder.encode(one.media, one.tokenizers) if self._encoder else one.media
        members = {f"{number}.{ending}": data for number, (ending, data) in enumerate(media)}
        return {"__key__": one.key, **members, "json": to_json(one.value, list(members))}

    def _media(self, record: Record) -> Iterator[tuple[str, bytes]]:
        """Ending and content of each media item."""
        for entry in media_entries(record.value):
            name = entry["media"]
            ending = Path(name).name.partition(".")[2].lower()
            if name in record.contents:
                data = record.contents[name]()
                self._require_size(name, len(data))
            else:
                data = self._file(self._source.base / name)
            yield ending, data

    def _file(self, path: Path) -> bytes:
        try:
            if not path.is_file():
                fix = f"Correct the path, which is relative to {self._source.base_name}, or remove the sample."
                raise SampleError("missing_media", f"there is no media file {str(path)!r}. {fix}")
            self._require_size(str(path), path.stat().st_size)
            data = path.read_bytes()
        except OSError as error:
            raise SampleError("media", f"its media file cannot be read: {error}.") from None
        self.reused += hash(path) in self._files
        self._files.add(hash(path))
        return data

    def _require_size(self, name: str, size: int) -> None:
        limit = self._limits.max_member_bytes
        if size > limit:
            raise SampleError("limit", f"{name!r} has {size} bytes, above data.limits.max_member_bytes={limit}.")


class _Packer:
    """One packing."""

    def __init__(
        self,
        source: Source,
        journal: PackingJournal,
        total: int,
        max_bad_share: float,
        writer: SampleWriter,
    ):
        self._source, self._journal, self._total = source, journal, total
        self._max_bad_share, self._writer = max_bad_share, writer
        self._progress = Progress("packing", total)
        self._bad: list[LeftOut] = []
        # Rule -> samples that it excludes.
        self._filtered: Counter[str] = Counter()

    def run(self, samples_per_shard: int) -> None:
        """Write every shard that the journal does not have."""
        records, progress = self._source.records(), self._progress
        if self._journal.finished:
            print(f"continuing after {len(self._journal.finished)} finished shards", file=sys.stderr)
        for number, first in enumerate(range(0, self._total, samples_per_shard)):
            size = min(samples_per_shard, self._total - first)
            stretch = islice(records, size)
            shard = self._journal.finished.get(number)
            if shard is None:
                path = self._journal.part(shard_name(number))
                shard = self._writer.write(number, path, stretch, self._report)
                self._journal.add(shard)
            else:
                self._writer.require_new_keys(stretch)
                progress.skip(size)
                self._count(shard.left_out)
            if shard.samples + len(shard.left_out) != size:
                raise DataError(f"{self._source.path!r} changed while it was read. Start again.")
        progress.finish()

    def _report(self, left_out: Optional[LeftOut]) -> None:
        self._progress.advance()
        if left_out:
            self._count([left_out])

    def _count(self, left_out: Sequence[LeftOut]) -> None:
        """Count samples; stop as soon as the share of bad ones must exceed the allowed one at the end."""
        self._filtered.update(by_rule(left_out))
        self._bad += [entry for entry in left_out if entry.is_bad]
        bad, most = len(self._bad), self._total - self._filtered.total()
        if bad > self._max_bad_share * most:
            raise DataError(
                f"{bad} of {most} samples of {self._source.path!r} cannot be used, above --max-bad-share "
                f"{self._max_bad_share}. All so far are listed in {INDEX_FOLDER}/{REFUSED_LEDGER}. The first: "
                f"{self._bad[0]}"
            )

    def write_refused(self, folder: Path) -> None:
        """Write the ledger of a refused packing into a folder."""
        if self._bad:
            folder.mkdir(exist_ok=True)
            (folder / REFUSED_LEDGER).write_bytes(b"".join(map(to_line, self._bad)))

    def summary(self) -> str:
        """Samples in = samples in shards + left out + excluded, with the reasons."""
        shards = [shard for shard in self._journal.finished.values() if shard.name]
        packed = sum(shard.samples for shard in shards)
        assert self._total == packed + len(self._bad) + self._filtered.total()
        text = f"{self._source.path}: "
        text += packing_summary(packed, len(shards), Counter(entry.code for entry in self._bad), self._filtered)
        if self._writer.reused:
            text += f"; {self._writer.reused} times a media file was stored again, because each sample has its own copy"
        return "\n".join([text, *self._source.remarks()])


def packing_summary(packed: int, shards: int, codes: Counter[str], rules: Counter[str]) -> str:
    """Samples in = samples in shards + left out + filtered.

    Args:
        packed: samples in shards.
        shards: number of shards.
        codes: samples that cannot be used, by code.
        rules: samples that a filter excludes, by rule.
    """
    text = f"{packed + codes.total() + rules.total()} samples = {packed} in {shards} shards"
    if codes:
        text += f" + {codes.total()} left out ({_counts(codes)})"
    if rules:
        text += f" + {rules.total()} filtered ({_counts(rules)})"
    return text


def _parse(value: dict[str, Any]) -> Sample:
    """Check a record's JSON.

    Raises:
        SampleError: it cannot be used, or has no text.
    """
    if "parts" not in value and "messages" not in value:
        raise SampleError("text", "its entry needs `parts`, `messages`, or `media` and `text`.")
    try:
        parsed = parse_sample(value, "its entry")
    except DataError as error:
        raise SampleError("text", str(error)) from None
    learned = (
        p.text.strip() if isinstance(p, TextPart) else isinstance(p, CodesPart) and p.loss for p in parsed.documents[0]
    )
    if parsed.kind == "parts" and not any(learned):
        fix = "Write its text, or remove the line."
        raise SampleError("text", f"its text is empty, so there is nothing to learn from it. {fix}")
    return parsed


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def _flush(path: Path) -> None:
    """Fsync a file: the journal must not list a shard that a power failure could lose."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
