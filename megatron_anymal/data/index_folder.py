"""Indexing of a folder of shards: several processes read each shard once, and a summary is printed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from typing import Any

import fsspec
import numpy as np

from megatron_anymal.child_processes import end_with_parent
from megatron_anymal.data.index_builder import IndexOptions, ShardRows, assemble, index_shard
from megatron_anymal.data.left_out import LEDGER, REFUSED_LEDGER, LeftOut, to_lines
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import INDEX_FOLDER, IndexHeader, write_index
from megatron_anymal.data.shard_samples import MemberCounts
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.modalities import load_plugins
from megatron_anymal.telemetry import Progress

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.Z")
# Maximum number of ledger lines that are printed; the file contains all of them.
_SHOWN = 20

# Loaded once in each indexing process.
_tokenizers: dict[str, Tokenizer] = {}


def find_shards(folder: str) -> list[str]:
    """The .tar files of a folder, sorted.

    Raises:
        DataError: the folder does not exist or contains no shards, or some of its shards could not be read: compressed
            ones, ones in subfolders, or ones whose extension is in capitals.
    """
    fs, root = fsspec.core.url_to_fs(folder.rstrip("/"))
    if not fs.isdir(root):
        raise DataError(f"There is no shard folder {folder!r}. Correct the path.")
    entries = {entry["name"].rpartition("/")[2]: entry["type"] for entry in fs.ls(root, detail=True)}
    files = sorted(name for name, kind in entries.items() if kind != "directory")
    shards = [name for name in files if name.endswith(".tar")]
    compressed = [name for name in files if name.lower().endswith(_COMPRESSED)]
    if compressed:
        raise DataError(
            f"{folder!r} contains {len(compressed)} compressed shard(s), the first {compressed[0]!r}. Samples are read "
            "by byte range: decompress them (gunzip, zstd -d), or move them to another folder."
        )
    spelled = [name for name in files if name.lower().endswith(".tar") and name not in shards]
    if spelled:
        raise DataError(
            f"{folder!r} contains {spelled[0]!r}, which is not read as a shard. Rename it to end with .tar."
        )
    inside = [name for name, kind in sorted(entries.items()) if kind == "directory" and _holds_shards(fs, root, name)]
    if inside:
        raise DataError(
            f"{folder!r} contains shards in the subfolder(s) {', '.join(inside[:5])}, which the index does not cover. "
            "Index each folder separately, or move the shards up."
        )
    if not shards:
        raise DataError(f"{folder!r} contains no .tar shard.")
    return shards


def _holds_shards(fs: Any, root: str, name: str) -> bool:
    return any(path.endswith(".tar") for path in fs.ls(f"{root}/{name}", detail=False))


def make_index(folder: str, options: IndexOptions, workers: int = 1, max_bad_share: float = 0.01) -> None:
    """Index every shard of a folder.

    Args:
        max_bad_share: maximum share of samples that may be left out, and of bytes that may be unreadable.

    Raises:
        DataError: there are no shards, or more is left out than allowed. The ledger is written in the latter case, too.
    """
    names = find_shards(folder)
    progress = Progress("indexing shards", len(names))
    shards = []
    for rows in _index_all(folder, names, options, workers):
        shards.append(rows)
        progress.advance()
    progress.finish()
    shards = shards if options.text_only else _without_lost_media(shards)
    left_out = [entry for shard in shards for entry in shard.left_out] + _repeated_keys(shards)
    _write_ledger(folder, LEDGER + ".part", left_out)
    bad = [entry for entry in left_out if not entry.is_note]
    for entry in left_out[:_SHOWN]:
        print(f"{'note' if entry.is_note else 'left out'}: {entry}", file=sys.stderr)
    if len(left_out) > _SHOWN:
        print(f"{len(left_out) - _SHOWN} more in {INDEX_FOLDER}/{LEDGER}; anymal inspect groups them", file=sys.stderr)
    _check_share(folder, shards, bad, max_bad_share)
    tables = assemble(shards)
    header = IndexHeader(
        shards=tuple(shard.name for shard in shards),
        shard_bytes=tuple(shard.size for shard in shards),
        kinds=tuple(tables.kinds),
        extensions=tuple(tables.extensions),
        tokenizer=Tokenizer(options.tokenizer).fingerprint(),
        attributes={kind: dict(values) for kind, values in options.attributes.items()},
    )
    members = MemberCounts()
    for shard in shards:
        members.add(shard.members)
    _rename_ledger(folder, LEDGER)
    write_index(folder, header, tables.samples, tables.media, tables.keys, _accounting(members, left_out, options))
    print(_summary(folder, len(tables.samples), len(tables.media), len(bad), len(shards), members))


def _without_lost_media(shards: Sequence[ShardRows]) -> list[ShardRows]:
    """Leave out samples that have only a .txt if others have media as well: their media are probably missing."""
    plain = [shard.samples["text_is_json"] == 0 for shard in shards]
    if not any((shard.samples["media_count"][mine] > 0).any() for shard, mine in zip(shards, plain)):
        return list(shards)
    reason = "it has no media although other samples do. If text-only samples are intended, add --text-only."
    return [
        shard.without(np.flatnonzero(mine & (shard.samples["media_count"] == 0)).tolist(), "no_media", reason)
        for shard, mine in zip(shards, plain)
    ]


def _repeated_keys(shards: Sequence[ShardRows]) -> list[LeftOut]:
    """Ledger notes for keys that occur in several shards."""
    hashes = [np.frombuffer(b"".join(_key_hashes(shard)), "<u8") for shard in shards]
    together = np.concatenate([np.zeros(0, "<u8"), *hashes])
    values, counts = np.unique(together, return_counts=True)
    if (counts == 1).all():
        return []
    rows = np.flatnonzero(np.isin(together, values[counts > 1]))
    starts = np.cumsum([0, *(len(own) for own in hashes)])
    shards_by_key: dict[str, list[str]] = {}
    for row in rows:
        number = int(np.searchsorted(starts, row, "right")) - 1
        shards_by_key.setdefault(shards[number].key(int(row - starts[number])), []).append(shards[number].name)
    return [
        LeftOut(names[0], "repeated_key", f"the key occurs in {len(names)} shards: {', '.join(names[:4])}", key=key)
        for key, names in shards_by_key.items()
        if len(names) > 1
    ]


def _key_hashes(shard: ShardRows) -> Iterator[bytes]:
    starts, lengths = shard.samples["key_offset"].tolist(), shard.samples["key_length"].tolist()
    for start, length in zip(starts, lengths):
        yield blake2b(shard.keys[start : start + length], digest_size=8).digest()


def _check_share(folder: str, shards: Sequence[ShardRows], bad: Sequence[LeftOut], allowed: float) -> None:
    good = sum(len(shard.samples) for shard in shards)
    size, damaged = sum(shard.size for shard in shards), sum(shard.damaged_bytes for shard in shards)
    problem = ""
    if len(bad) > allowed * (good + len(bad)):
        problem = f"{len(bad)} of {good + len(bad)} samples of {folder!r} are bad"
    elif not good:
        problem = f"no sample of {folder!r} can be used"
    elif damaged > allowed * size:
        problem = f"{damaged} of {size} bytes of {folder!r} are unreadable"
    if problem:
        _rename_ledger(folder, REFUSED_LEDGER)
        first = f" The first: {bad[0]}" if bad else ""
        raise DataError(
            f"{problem}, above --max-bad-share {allowed}. All are listed in {INDEX_FOLDER}/{REFUSED_LEDGER}.{first}"
        )


def _accounting(members: MemberCounts, left_out: Sequence[LeftOut], options: IndexOptions) -> dict[str, Any]:
    """The entries of index.json about everything that is not in the index, and the limits it was built with."""
    return {
        "members": {
            "seen": members.seen,
            "used": members.used,
            "ignored": dict(members.ignored.most_common()),
            "bad": members.bad,
        },
        "left_out": dict(Counter(entry.code for entry in left_out)),
        "limits": dataclasses.asdict(options.limits),
    }


def _summary(folder: str, samples: int, media: int, bad: int, shards: int, members: MemberCounts) -> str:
    ignored = sum(members.ignored.values())
    kinds = ", ".join(f"{what} {count}" for what, count in members.ignored.most_common(6))
    return (
        f"{folder}: {samples} samples, {media} media items, {bad} left out, {shards} shards; {members.seen} members = "
        f"{members.used} used + {members.bad} left out + {ignored} ignored{f' ({kinds})' if kinds else ''}"
    )


def _write_ledger(folder: str, name: str, entries: Sequence[LeftOut]) -> None:
    fs, root = fsspec.core.url_to_fs(folder.rstrip("/"))
    fs.makedirs(f"{root}/{INDEX_FOLDER}", exist_ok=True)
    with fs.open(f"{root}/{INDEX_FOLDER}/{name}", "wb") as file:
        for line in to_lines(entries):
            file.write(line)


def _rename_ledger(folder: str, name: str) -> None:
    """Rename the ledger to its final name. Once an index is built, the ledger of a refused attempt is removed."""
    fs, root = fsspec.core.url_to_fs(folder.rstrip("/"))
    inside = f"{root}/{INDEX_FOLDER}"
    if name == LEDGER and fs.exists(f"{inside}/{REFUSED_LEDGER}"):
        fs.rm_file(f"{inside}/{REFUSED_LEDGER}")
    fs.mv(f"{inside}/{LEDGER}.part", f"{inside}/{name}")


def _index_all(folder: str, names: Sequence[str], options: IndexOptions, workers: int) -> Iterator[ShardRows]:
    jobs = [(folder, name, options) for name in names]
    if workers <= 1 or len(names) == 1:
        yield from map(_index_one, jobs)
        return
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(names)), mp_context=processes, initializer=end_with_parent) as pool:
        yield from pool.map(_index_one, jobs)


def _index_one(job: tuple[str, str, IndexOptions]) -> ShardRows:
    folder, name, options = job
    load_plugins(list(options.plugins))
    if options.tokenizer not in _tokenizers:
        _tokenizers[options.tokenizer] = Tokenizer(options.tokenizer)
    return index_shard(folder, name, _tokenizers[options.tokenizer], options)
