"""Indexing of a folder of shards: several processes read each shard once, and a summary is printed."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np

from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_processes import ShardReader, index_shards, useful_workers
from megatron_anymal.data.index_writer import RowSpool, join_shards, open_spool, write_index
from megatron_anymal.data.left_out import INDEX_FOLDER, LEDGER, REFUSED_LEDGER, LeftOut, by_rule, to_lines
from megatron_anymal.data.packing_journal import Packed, packed_of
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import IndexHeader
from megatron_anymal.data.shard_rows import HASH, ShardRows, repeated
from megatron_anymal.data.shard_samples import MemberCounts
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.telemetry import Progress

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.Z")
# Maximum number of ledger lines that are printed; the file contains all of them.
_SHOWN = 20


def find_shards(folder: str) -> dict[str, int]:
    """The .tar files of a folder, sorted by name, and their sizes in bytes.

    Raises:
        DataError: the folder does not exist or contains no shards, or some of its shards could not be read: compressed
            ones, ones in subfolders, or ones whose extension is in capitals.
    """
    fs, root = fsspec.core.url_to_fs(folder.rstrip("/"))
    if not fs.isdir(root):
        raise DataError(f"There is no shard folder {folder!r}. Correct the path.")
    listed = {entry["name"].rpartition("/")[2]: entry for entry in fs.ls(root, detail=True)}
    entries = {name: entry["type"] for name, entry in listed.items()}
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
    return {name: int(listed[name]["size"] or 0) for name in shards}


def _holds_shards(fs: Any, root: str, name: str) -> bool:
    return any(path.endswith(".tar") for path in fs.ls(f"{root}/{name}", detail=False))


def make_index(folder: str, options: IndexOptions, workers: int = 1, max_bad_share: float = 0.01) -> None:
    """Index every shard of a folder.

    Args:
        workers: maximum number of processes; a small folder is indexed by fewer.
        max_bad_share: maximum share of samples that may be left out, and of bytes that may be unreadable.

    Raises:
        DataError: there are no shards, the tokenizer cannot be used, nothing can be written next to the shards, or
            more is left out than allowed. The ledger is written in the last case, too.
        ConfigError: a plug-in cannot be imported.
    """
    sizes = find_shards(folder)
    reader = ShardReader(folder, options, Tokenizer(options.tokenizer))
    with open_spool(folder) as spool:
        has_media = False
        progress = Progress("indexing shards", len(sizes))
        for number, rows in index_shards(reader, list(sizes), useful_workers(workers, sizes.values())):
            has_media |= bool((_of_txt(rows) & (rows.samples["media_count"] > 0)).any())
            spool.add(number, rows)
            progress.advance()
        progress.finish()
        shards = _Shards(spool, has_media and not options.text_only)
        packed = _packed(folder, sizes)
        _finish(folder, options, shards, packed, reader.tokenizer.fingerprint(), max_bad_share)


def _packed(folder: str, sizes: Mapping[str, int]) -> Packed | None:
    fs, root = fsspec.core.url_to_fs(folder.rstrip("/"))
    return packed_of(fs, root, sizes)


def _finish(
    folder: str, options: IndexOptions, shards: _Shards, packed: Packed | None, tokenizer: str, max_bad_share: float
) -> None:
    """Write the ledger, and the index unless too much is left out."""
    totals = _Totals()
    for rows in shards:
        totals.add(rows)
    left_out = [*(packed.left_out if packed else []), *totals.left_out, *_repeated_keys(totals, shards)]
    _write_ledger(folder, LEDGER + ".part", left_out)
    bad = [entry for entry in left_out if entry.is_bad]
    shown = [entry for entry in left_out if not entry.rule]
    for entry in shown[:_SHOWN]:
        print(f"{'note' if entry.is_note else 'left out'}: {entry}", file=sys.stderr)
    if len(shown) > _SHOWN:
        print(f"{len(shown) - _SHOWN} more in {INDEX_FOLDER}/{LEDGER}; anymal inspect groups them", file=sys.stderr)
    _check_share(folder, totals, bad, max_bad_share)
    header = IndexHeader(
        shards=tuple(totals.names),
        shard_bytes=tuple(totals.sizes),
        kinds=tuple(sorted(totals.kinds)),
        extensions=tuple(sorted(totals.extensions)),
        tokenizer=tokenizer,
        attributes={kind: dict(values) for kind, values in options.attributes.items()},
    )
    _rename_ledger(folder, LEDGER)
    tables = join_shards(shards, header.kinds, header.extensions)
    accounting = _accounting(totals.members, left_out, options)
    write_index(folder, header, totals.samples, totals.media, tables, accounting)
    print(_summary(folder, totals, len(bad)))
    if packed or options.filters:
        print(_samples_in(totals.samples, left_out, packed))


def _of_txt(rows: ShardRows) -> np.ndarray:
    """Samples described by a .txt, as a mask."""
    return rows.samples["text_is_json"] == 0


@dataclass(frozen=True)
class _Shards:
    """The rows of all shards in order; they are read again each time."""

    spool: RowSpool
    # Leave out samples that have only a .txt, because others have media as well: their media are probably missing.
    need_media: bool

    def __iter__(self) -> Iterator[ShardRows]:
        reason = "it has no media although other samples do. If text-only samples are intended, add --text-only."
        for rows in self.spool:
            if self.need_media:
                lost = np.flatnonzero(_of_txt(rows) & (rows.samples["media_count"] == 0)).tolist()
                rows = rows.without(lost, "no_media", reason)
            yield rows


@dataclass
class _Totals:
    """What the shards of a folder add up to."""

    names: list[str] = field(default_factory=list)
    # Of the shards, in bytes.
    sizes: list[int] = field(default_factory=list)
    damaged_bytes: int = 0
    samples: int = 0
    media: int = 0
    kinds: set[str] = field(default_factory=set)
    extensions: set[str] = field(default_factory=set)
    members: MemberCounts = field(default_factory=MemberCounts)
    left_out: list[LeftOut] = field(default_factory=list)
    # HASH of each sample's key.
    key_hashes: bytearray = field(default_factory=bytearray)

    def add(self, rows: ShardRows) -> None:
        """Add a shard."""
        self.names.append(rows.name)
        self.sizes.append(rows.size)
        self.damaged_bytes += rows.damaged_bytes
        self.samples += len(rows.samples)
        self.media += len(rows.media)
        self.kinds.update(rows.kinds)
        self.extensions.update(rows.extensions)
        self.members.add(rows.members)
        self.left_out += rows.left_out
        self.key_hashes += rows.key_hashes.tobytes()


def _repeated_keys(totals: _Totals, shards: Iterable[ShardRows]) -> list[LeftOut]:
    """Ledger notes for keys that occur in several shards."""
    values = repeated(np.frombuffer(totals.key_hashes, HASH))
    if not len(values):
        return []
    # Number of shards and names of the first four.
    by_key: dict[str, tuple[int, list[str]]] = {}
    for rows in shards:
        for number in np.flatnonzero(np.isin(rows.key_hashes, values)).tolist():
            key = rows.key(number)
            count, names = by_key.get(key, (0, []))
            by_key[key] = count + 1, names if count >= 4 else [*names, rows.name]
    return [
        LeftOut(names[0], "repeated_key", f"the key occurs in {count} shards: {', '.join(names)}", key=key)
        for key, (count, names) in by_key.items()
        if count > 1
    ]


def _check_share(folder: str, totals: _Totals, bad: Sequence[LeftOut], allowed: float) -> None:
    good, size, damaged = totals.samples, sum(totals.sizes), totals.damaged_bytes
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
    rules = by_rule(left_out)
    return {
        "members": {
            "seen": members.seen,
            "used": members.used,
            "ignored": dict(members.ignored.most_common()),
            "bad": members.bad,
        },
        "left_out": dict(Counter(entry.code for entry in left_out)),
        **({"filtered": dict(rules)} if rules else {}),
        "limits": dataclasses.asdict(options.limits),
    }


def _summary(folder: str, totals: _Totals, bad: int) -> str:
    members = totals.members
    ignored = sum(members.ignored.values())
    kinds = ", ".join(f"{what} {count}" for what, count in members.ignored.most_common(6))
    return (
        f"{folder}: {totals.samples} samples, {totals.media} media items, {bad} left out, {len(totals.names)} shards; "
        f"{members.seen} members = {members.used} used + {members.bad} left out + {ignored} ignored"
        f"{f' ({kinds})' if kinds else ''}"
    )


def _samples_in(used: int, left_out: Sequence[LeftOut], packed: Packed | None) -> str:
    """Samples in = used + left out + filtered; in is the number that a source has, or else that of samples found."""
    bad = sum(entry.is_bad and bool(entry.key) for entry in left_out)
    rules = by_rule(left_out)
    found = used + bad + rules.total()
    counts = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
    text = f"{found} samples in = {used} used + {bad} left out + {rules.total()} filtered"
    text += f" ({counts})" if counts else ""
    if packed and packed.samples != found:
        # Damage to a shard may cost samples whose keys are lost with them.
        text += f"; {packed.source!r} had {packed.samples}"
    return text


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
