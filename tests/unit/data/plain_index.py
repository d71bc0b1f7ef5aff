"""Oracle of the index files: all rows of a folder as Python tuples, then as arrays, then written with np.save."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from megatron_anymal.data import length_bounds
from megatron_anymal.data.index_builder import IndexOptions, _Indexer, _Row
from megatron_anymal.data.index_format import MEDIA, SAMPLE, IndexHeader
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.records import SAMPLE_KINDS
from megatron_anymal.data.shard_listing import ShardFile, find_shards
from megatron_anymal.data.shard_rows import ShardRows
from megatron_anymal.data.shard_samples import Group, MemberCounts, SampleError, groups
from megatron_anymal.data.tar.byte_source import LocalBytes
from megatron_anymal.data.tar.reader import TarError, TarWalk
from megatron_anymal.data.tokenizer import Tokenizer


@dataclass
class Shard:
    """A shard's usable samples, its kinds and extensions by their numbers in the rows, and its accounting."""

    name: str
    size: int
    modified: str
    samples: list[tuple[Group, _Row]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    members: MemberCounts = field(default_factory=MemberCounts)
    # Keys in keys.bin; those of samples that lost their media stay there.
    keys: list[str] = field(default_factory=list)
    damaged_bytes: int = 0


def index_files(folder: Path, options: IndexOptions, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The content of each file of the index, however much is left out."""
    shards = [_read(folder, file, options, tokenizer) for file in find_shards(str(folder)).values()]
    plain = [(g, r) for shard in shards for g, r in shard.samples if not _is_json(r)]
    if not options.text_only and any(row.media for _, row in plain):
        for shard in shards:
            _leave_out_lost_media(shard)
    left_out = [entry for shard in shards for entry in shard.left_out] + _repeated(shards)
    kinds = sorted({kind for shard in shards for kind in shard.kinds})
    extensions = sorted({extension for shard in shards for extension in shard.extensions})
    samples, media = _tables(shards, kinds, extensions)
    keys = "".join(key for shard in shards for key in shard.keys).encode()
    tables = (samples.tobytes(), media.tobytes())
    members = MemberCounts()
    for shard in shards:
        members.add(shard.members)
    header = IndexHeader(
        tuple(shard.name for shard in shards),
        tuple(shard.size for shard in shards),
        tuple(kinds),
        tuple(extensions),
        tokenizer.fingerprint(),
        attributes={kind: dict(values) for kind, values in options.attributes.items()},
    )
    ignored = dict(members.ignored.most_common())
    accounting = {
        "members": {"seen": members.seen, "used": members.used, "ignored": ignored, "bad": members.bad},
        "left_out": dict(Counter(entry.code for entry in left_out)),
        "limits": dataclasses.asdict(options.limits),
        "options": options.identity(tokenizer.fingerprint()),
        "counts": _counts(samples, media, kinds),
        "content": sha256(b"".join(sha256(data).digest() for data in (*tables, keys))).hexdigest(),
    }
    return {
        "samples.npy": _npy(samples),
        "media.npy": _npy(media),
        "keys.bin": keys,
        "bounds.npy": _npy(_bounds(samples, media, len(kinds))),
        "shards.jsonl": _lines([_accounting(shard) for shard in shards]),
        "left_out.jsonl": _lines([entry.to_dict() for entry in left_out]),
        "index.json": header.with_accounting(len(samples), len(media), accounting).encode(),
    }


def _lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _accounting(shard: Shard) -> dict[str, Any]:
    return {
        "name": shard.name,
        "bytes": shard.size,
        "modified": shard.modified,
        "samples": len(shard.samples),
        "media": sum(len(row.media) for _, row in shard.samples),
        "key_bytes": len("".join(shard.keys).encode()),
        "kinds": shard.kinds,
        "extensions": shard.extensions,
        "members": {**vars(shard.members), "ignored": dict(shard.members.ignored)},
        "damaged_bytes": shard.damaged_bytes,
        "text_with_media": any(row.media and not _is_json(row) for _, row in shard.samples),
    }


def _counts(samples: np.ndarray, media: np.ndarray, kinds: list[str]) -> dict[str, Any]:
    of_samples, of_media = Counter(samples["kind"].tolist()), Counter(media["kind"].tolist())
    return {
        "samples": {kind: of_samples[n] for n, kind in enumerate(SAMPLE_KINDS) if of_samples[n]},
        "media": {kind: of_media[n] for n, kind in enumerate(kinds) if of_media[n]},
        "block": length_bounds.BLOCK,
    }


def _bounds(samples: np.ndarray, media: np.ndarray, kinds: int) -> np.ndarray:
    """Sample by sample."""
    groups: list[dict[bytes, Any]] = [{} for _ in range(-(-len(samples) // length_bounds.BLOCK))]
    for number, row in enumerate(samples):
        items = media[row["media_start"] : row["media_start"] + row["media_count"]]
        bound = np.zeros(1, length_bounds.bound_type(kinds))
        bound["block"] = number // length_bounds.BLOCK
        bound["tokens"] = int(row["tokens"]) + int(row["rejected_tokens"])
        bound["documents"] = 1 + (row["rejected_tokens"] > 0)
        for item in items:
            bound["media"][0, item["kind"]] += 1
            bound["size"][0, item["kind"]] = np.maximum(bound["size"][0, item["kind"]], item["size"])
        group = groups[number // length_bounds.BLOCK]
        key = bound["documents"].tobytes() + bound["media"].tobytes()
        group[key] = _maximum([group[key], bound]) if key in group else bound
    rows = [[group[key] for key in sorted(group)] for group in groups]
    rows = [[_maximum(block)] if len(block) > length_bounds.MAX_GROUPS else block for block in rows]
    return np.concatenate([np.zeros(0, length_bounds.bound_type(kinds)), *(bound for block in rows for bound in block)])


def _maximum(bounds: list[np.ndarray]) -> np.ndarray:
    highest = bounds[0].copy()
    for bound in bounds:
        for name in highest.dtype.names or ():
            highest[name] = np.maximum(highest[name], bound[name])
    return highest


def _read(folder: Path, file: ShardFile, options: IndexOptions, tokenizer: Tokenizer) -> Shard:
    name, size = file.name, (folder / file.name).stat().st_size
    rows = ShardRows(name, size)
    with (folder / name).open("rb") as opened:
        indexer = _Indexer(LocalBytes(opened.fileno()), rows, tokenizer, options)
        try:
            walk = TarWalk(LocalBytes(opened.fileno()), options.limits.max_text_bytes)
            good: list[tuple[Group, _Row]] = []
            seen: Counter[str] = Counter()
            for group in groups(walk, name, rows.members, rows.left_out):
                seen[group.key] += 1
                try:
                    good.append((group, indexer._row(group)))
                except SampleError as error:
                    rows.members.bad += group.seen
                    rows.left_out.append(LeftOut(name, error.code, str(error), group.offset, group.key))
        except TarError as error:
            return Shard(
                name, size, file.modified, left_out=[LeftOut(name, "unreadable", str(error))], damaged_bytes=size
            )
    kept = []
    for group, row in good:
        if seen[group.key] > 1:
            reason = (
                f"its key occurs in {seen[group.key]} places of the shard. Members of a sample must be consecutive, "
                "and keys must be unique."
            )
            rows.members.bad += group.seen
            rows.left_out.append(LeftOut(name, "duplicate_key", reason, group.offset, group.key))
            continue
        rows.members.used += row.used
        rows.members.ignored.update(row.ignored)
        kept.append((group, row))
    keys = [group.key for group, _ in kept]
    return Shard(
        name,
        size,
        file.modified,
        kept,
        rows.kinds,
        rows.extensions,
        rows.left_out,
        rows.members,
        keys,
        walk.bytes.damaged,
    )


def _is_json(row: _Row) -> bool:
    return bool(row.sample[3])


def _leave_out_lost_media(shard: Shard) -> None:
    reason = "it has no media although other samples do. If text-only samples are intended, add --text-only."
    lost = [(group, row) for group, row in shard.samples if not _is_json(row) and not row.media]
    shard.samples = [(group, row) for group, row in shard.samples if _is_json(row) or row.media]
    shard.left_out += [LeftOut(shard.name, "no_media", reason, row.sample[0], group.key) for group, row in lost]
    shard.members.used -= len(lost)
    shard.members.bad += len(lost)


def _repeated(shards: list[Shard]) -> list[LeftOut]:
    """Notes on keys that occur in several shards, in the order of their first occurrence."""
    by_key: dict[str, list[str]] = {}
    for shard in shards:
        for group, _ in shard.samples:
            by_key.setdefault(group.key, []).append(shard.name)
    return [
        LeftOut(names[0], "repeated_key", f"the key occurs in {len(names)} shards: {', '.join(names[:4])}", key=key)
        for key, names in by_key.items()
        if len(names) > 1
    ]


def _tables(shards: list[Shard], kinds: list[str], extensions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The tables, filled field by field."""
    samples: list[dict[str, Any]] = []
    media: list[dict[str, Any]] = []
    key_bytes = 0
    for number, shard in enumerate(shards):
        offsets = {}
        for key in shard.keys:
            offsets[key] = key_bytes
            key_bytes += len(key.encode())
        for group, row in shard.samples:
            values = dict(zip(SAMPLE.names[1:10], row.sample, strict=True))  # type: ignore[index]
            location = {"shard": number, "key_offset": offsets[group.key], "key_length": len(group.key.encode())}
            samples.append({**values, **location, "media_start": len(media), "media_count": len(row.media)})
            for offset, length, crc, kind, extension, *size in row.media:
                names = kinds.index(shard.kinds[kind]), extensions.index(shard.extensions[extension])
                media.append(dict(zip(MEDIA.names or (), (offset, length, crc, *names, size), strict=True)))
    tables = np.zeros(len(samples), SAMPLE), np.zeros(len(media), MEDIA)
    for table, rows in zip(tables, (samples, media)):
        for position, row in enumerate(rows):
            for name, value in row.items():
                table[position][name] = value
    return tables


def _npy(table: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, table)
    return out.getvalue()
