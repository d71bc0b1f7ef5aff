"""Completes an index from the rows of all shards: checks what is left out, writes the ledger and the index."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

from megatron_anymal.data.index_format import IndexHeader
from megatron_anymal.data.index_writer import join_shards, local_folder, write_index
from megatron_anymal.data.left_out import INDEX_FOLDER, LEDGER, REFUSED_LEDGER, LedgerWriter, LeftOut
from megatron_anymal.data.packing_journal import Packed, packed_of
from megatron_anymal.data.records import DataError
from megatron_anymal.data.repeated_keys import KeyHashes, open_hashes, repeated_keys
from megatron_anymal.data.shard_rows import ShardRows
from megatron_anymal.data.shard_samples import MemberCounts
from megatron_anymal.object_storage.client import file_system

# Maximum number of ledger lines that are printed; the file contains all of them.
_SHOWN = 20


class RowStore(Protocol):
    """The rows of shards."""

    def entry(self, name: str) -> Mapping[str, Any]:
        """`accounting` of a shard, or a part of it: `bytes`, `samples` and `text_with_media`."""

    def rows(self, name: str) -> ShardRows:
        """The rows of a shard; the caller may change the arrays."""


def complete_index(
    folder: str,
    stores: Mapping[str, RowStore],
    options: Mapping[str, Any],
    max_bad_share: float,
    unique_keys: bool = False,
) -> None:
    """Write the ledger, and the index unless too much is left out.

    Args:
        stores: what has the rows of each shard, by name and in the order of the index.
        options: `IndexOptions.identity` of the rows.
        max_bad_share: maximum share of samples that may be left out, and of bytes that may be unreadable.
        unique_keys: whether a key may occur only once in the folder.

    Raises:
        DataError: more is left out than allowed, or a key repeats although it may not. The ledger is written, too.
        StorageError: the object store cannot be used.
    """
    entries = [store.entry(name) for name, store in stores.items()]
    text_with_media = any(entry["text_with_media"] for entry in entries)
    shards = _Shards(stores, text_with_media and not options["text_only"])
    samples = sum(entry["samples"] for entry in entries)
    fs, root = file_system(folder)
    packed = packed_of(fs, root, {name: entry["bytes"] for name, entry in zip(stores, entries)})
    totals, ledger, repeats = _write_ledger(folder, samples, shards, packed)
    problem = totals.problem(folder, ledger.bad, max_bad_share)
    first = f" The first: {ledger.first_bad}" if ledger.first_bad else ""
    if not problem and unique_keys and repeats:
        problem = f"{len(repeats)} key(s) of the manifest occur several times. Give each line a key of its own."
        first = f" The first: {repeats[0].key!r}, {repeats[0].reason}"
    if problem:
        _rename_ledger(folder, REFUSED_LEDGER)
        raise DataError(f"{problem} All are listed in {INDEX_FOLDER}/{REFUSED_LEDGER}.{first}")
    header = totals.header(options)
    tables = join_shards(shards, header.kinds, header.extensions)
    accounting = {
        **totals.accounting(),
        "left_out": dict(ledger.codes),
        **({"filtered": dict(ledger.rules)} if ledger.rules else {}),
        "limits": options["limits"],
        "options": options,
    }
    # Until then, an older index and its ledger stay as they are.
    write_index(folder, header, totals.samples, totals.media, tables, accounting)
    _rename_ledger(folder, LEDGER)
    print(totals.summary(folder, ledger.bad))
    if packed or options["filters"]:
        print(_samples_in(totals.samples, ledger, packed))


def _write_ledger(
    folder: str, samples: int, shards: _Shards, packed: Optional[Packed]
) -> tuple[_Totals, LedgerWriter, list[LeftOut]]:
    """Write the ledger under a temporary name; returns the notes on repeated keys as well."""
    fs, root = file_system(folder)
    inside, totals = f"{root}/{INDEX_FOLDER}", _Totals()
    beside = local_folder(folder)
    # Remains of a killed process. An object store has no folder before its first object.
    for path in fs.ls(inside, detail=False) if fs.isdir(inside) else ():
        if path.endswith(".part"):
            fs.rm_file(path)
    with fs.open(f"{inside}/{LEDGER}.part", "wb") as file, open_hashes(samples, beside) as hashes:
        ledger = LedgerWriter(file, _SHOWN)
        if packed:
            ledger.add(packed.left_out())
        for rows in shards:
            totals.add(rows, hashes)
            ledger.add(rows.left_out)
        repeats = repeated_keys(hashes.repeated(), shards)
        ledger.add(repeats)
    _print_first(ledger)
    return totals, ledger, repeats


def _print_first(ledger: LedgerWriter) -> None:
    for entry in ledger.first:
        print(f"{'note' if entry.is_note else 'left out'}: {entry}", file=sys.stderr)
    more = ledger.codes.total() - ledger.rules.total() - len(ledger.first)
    if more:
        print(f"{more} more in {INDEX_FOLDER}/{LEDGER}; anymal inspect groups them", file=sys.stderr)


def _samples_in(used: int, ledger: LedgerWriter, packed: Optional[Packed]) -> str:
    """Samples in = used + left out + filtered; in is the number that a source has, or else that of samples found."""
    filtered = ledger.rules.total()
    samples_in = used + ledger.bad_samples + filtered
    counts = ", ".join(f"{rule} {count}" for rule, count in ledger.rules.most_common())
    text = f"{samples_in} samples in = {used} used + {ledger.bad_samples} left out + {filtered} filtered"
    text += f" ({counts})" if counts else ""
    if packed and packed.samples != samples_in:
        # Damage to a shard may cost samples whose keys are lost with them.
        text += f"; {packed.source!r} had {packed.samples}"
    return text


@dataclass(frozen=True)
class _Shards:
    """The rows of all shards as they stand in the index."""

    stores: Mapping[str, RowStore]
    # Leave out samples that have only a .txt, because others have media as well: their media are probably missing.
    need_media: bool

    def __iter__(self) -> Iterator[ShardRows]:
        for name, store in self.stores.items():
            rows = store.rows(name)
            yield rows.without_lost_media() if self.need_media else rows


@dataclass
class _Totals:
    """What the shards of a folder add up to."""

    names: list[str] = field(default_factory=list)
    # Size of each shard, in bytes.
    sizes: list[int] = field(default_factory=list)
    damaged_bytes: int = 0
    samples: int = 0
    media: int = 0
    kinds: set[str] = field(default_factory=set)
    extensions: set[str] = field(default_factory=set)
    members: MemberCounts = field(default_factory=MemberCounts)

    def add(self, rows: ShardRows, hashes: KeyHashes) -> None:
        """Add a shard."""
        self.names.append(rows.name)
        self.sizes.append(rows.size)
        self.damaged_bytes += rows.damaged_bytes
        self.samples += len(rows.samples)
        self.media += len(rows.media)
        self.kinds.update(rows.kinds)
        self.extensions.update(rows.extensions)
        self.members.add(rows.members)
        hashes.add(rows.key_hashes())

    def problem(self, folder: str, bad: int, allowed: float) -> str:
        """Why no index may be written; "" if it may."""
        size, problem = sum(self.sizes), ""
        if bad > allowed * (self.samples + bad):
            problem = f"{bad} of {self.samples + bad} samples of {folder!r} are bad"
        elif not self.samples:
            problem = f"no sample of {folder!r} can be used"
        elif self.damaged_bytes > allowed * size:
            problem = f"{self.damaged_bytes} of {size} bytes of {folder!r} are unreadable"
        return f"{problem}, above --max-bad-share {allowed}." if problem else ""

    def header(self, options: Mapping[str, Any]) -> IndexHeader:
        """The header of the index."""
        return IndexHeader(
            shards=tuple(self.names),
            shard_bytes=tuple(self.sizes),
            kinds=tuple(sorted(self.kinds)),
            extensions=tuple(sorted(self.extensions)),
            tokenizer=options["tokenizer"],
            attributes=options["attributes"],
        )

    def accounting(self) -> dict[str, Any]:
        """The counts of members in index.json."""
        members = self.members
        ignored = dict(members.ignored.most_common())
        return {"members": {"seen": members.seen, "used": members.used, "ignored": ignored, "bad": members.bad}}

    def summary(self, folder: str, bad: int) -> str:
        """One line about the index."""
        members = self.members
        ignored = sum(members.ignored.values())
        kinds = ", ".join(f"{what} {count}" for what, count in members.ignored.most_common(6))
        return (
            f"{folder}: {self.samples} samples, {self.media} media items, {bad} left out, {len(self.names)} shards; "
            f"{members.seen} members = {members.used} used + {members.bad} left out + {ignored} ignored"
            f"{f' ({kinds})' if kinds else ''}"
        )


def _rename_ledger(folder: str, name: str) -> None:
    """Rename the ledger to its final name. Once an index is built, the ledger of a refused attempt is removed."""
    fs, root = file_system(folder)
    inside = f"{root}/{INDEX_FOLDER}"
    if name == LEDGER and fs.exists(f"{inside}/{REFUSED_LEDGER}"):
        fs.rm_file(f"{inside}/{REFUSED_LEDGER}")
    fs.mv(f"{inside}/{LEDGER}.part", f"{inside}/{name}")
