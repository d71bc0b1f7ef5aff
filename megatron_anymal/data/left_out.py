"""The ledger of an index, `left_out.jsonl`: every sample and member that was left out, and why.

One JSON object per line, first the samples of the source that were not packed, then in the order of the shards:
`source` or `shard`, `offset` (bytes from the start of the shard), `key` and `member` if known, `code` (CODES),
`reason`, and `rule` for a sample that a filter excludes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Optional

# Folder of an index, next to its shards.
INDEX_FOLDER = "index"
LEDGER = "left_out.jsonl"
# The ledger of a refused indexing has its own name, so that it cannot be mistaken for that of an older index.
REFUSED_LEDGER = "left_out.refused.jsonl"

CODES = {
    "unreadable": "shards that cannot be read at all: compressed, empty, not tar, or an error of the file system",
    "damaged": "bytes between members that are not a valid tar header",
    "truncated": "members cut off by the end of the shard",
    "no_end": "shards without end-of-archive blocks",
    "bad_header": "members whose extension header is damaged",
    "torn": "samples next to damaged bytes, possibly incomplete",
    "not_a_file": "samples with links, sparse files or devices instead of files",
    "name": "members whose name is empty, not UTF-8 or too long",
    "duplicate_member": "samples with two members that have the same ending",
    "duplicate_key": "samples whose key occurs again in the same shard",
    "limit": "samples that exceed one of data.limits",
    "text": "samples whose text or JSON cannot be used",
    "media": "samples whose media cannot be used",
    "missing_media": "samples that name media that do not exist",
    "unused_media": "samples with media that their JSON does not name",
    "placeholders": "samples whose placeholders and media differ in number",
    "column": "samples without a column that a filter or an option names",
    "filtered": "samples that a --filter rule excludes",
    "unchecked": "samples that a classifier of an integrity file could not check",
    "no_media": "samples without media among samples with media",
    "joined": "places where one archive follows another in the same file (both are read)",
    "long_end": "shards that end with many zeros, as if their last members had been overwritten",
    "repeated_key": "keys that occur in several shards (all their samples are used)",
}
# Informational: nothing is left out.
NOTES = ("joined", "long_end", "repeated_key")
# Left out because the user asked for it.
FILTERED = "filtered"


@dataclass(frozen=True)
class LeftOut:
    """One line of the ledger."""

    # File name of the shard; empty for a sample that was not packed.
    shard: str
    # A key of CODES.
    code: str
    # Why it was left out, for the user.
    reason: str
    # Bytes from the start of the shard; -1 for the whole shard.
    offset: int = -1
    # Key of the sample; empty if it is not known.
    key: str = ""
    # Name of the member; empty if the entry is not about a single one.
    member: str = ""
    # Where the source lists a sample that was not packed, such as FILE:LINE.
    source: str = ""
    # The --filter rule that excludes the sample.
    rule: str = ""

    @property
    def is_note(self) -> bool:
        """Whether the entry is informational and leaves nothing out."""
        return self.code in NOTES

    @property
    def is_bad(self) -> bool:
        """Whether the entry is about something that should have been used; --max-bad-share bounds these."""
        return not self.is_note and self.code != FILTERED

    def __str__(self) -> str:
        """Human-readable line: the sample, member or shard, then the reason."""
        what = f"sample {self.key!r} of " if self.key else ""
        member = f", member {self.member!r}" if self.member else ""
        where = f"shard {self.shard!r}" if self.shard else self.source
        return f"{what}{where}{member}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not empty."""
        return {name: value for name, value in vars(self).items() if value != ""}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> LeftOut:
        """The entry that `to_dict` returned as `value`."""
        return LeftOut(**{"shard": "", **value})


def to_line(entry: LeftOut) -> bytes:
    """The line of an entry in the ledger file."""
    return json.dumps(entry.to_dict()).encode() + b"\n"


def by_rule(entries: Iterable[LeftOut]) -> Counter[str]:
    """Number of samples that each --filter rule excludes."""
    return Counter(entry.rule for entry in entries if entry.rule)


def read_ledger(fs: Any, path: str) -> list[LeftOut]:
    """The entries of a ledger; empty if the file does not exist, as for an index of an earlier version."""
    if not fs.exists(path):
        return []
    return [LeftOut.from_dict(json.loads(line)) for line in fs.cat_file(path).splitlines() if line]


class LedgerWriter:
    """Writes a ledger line by line; keeps the counts, and the first entries that no filter made."""

    def __init__(self, file: IO[bytes], shown: int):
        """Start an empty ledger.

        Args:
            shown: number of entries to keep in `first`.
        """
        self._file, self._shown = file, shown
        # Number of entries by code, in the order of their first ones.
        self.codes: Counter[str] = Counter()
        # Number of samples that each --filter rule excludes.
        self.rules: Counter[str] = Counter()
        # Number of entries about what should have been used, those of them about a sample, and the first one.
        self.bad = self.bad_samples = 0
        self.first_bad: Optional[LeftOut] = None
        self.first: list[LeftOut] = []

    def add(self, entries: Iterable[LeftOut]) -> None:
        """Write entries."""
        for entry in entries:
            self._file.write(to_line(entry))
            self.codes[entry.code] += 1
            if entry.rule:
                self.rules[entry.rule] += 1
            if entry.is_bad:
                self.bad += 1
                self.bad_samples += bool(entry.key)
                self.first_bad = self.first_bad or entry
            if not entry.rule and len(self.first) < self._shown:
                self.first.append(entry)


def grouped(entries: Iterable[LeftOut], examples: int = 2) -> Iterator[str]:
    """Summarize a ledger: for each code, most frequent first, its count, meaning and first entries."""
    entries = list(entries)
    for code, count in Counter(entry.code for entry in entries).most_common():
        yield f"{code} {count}: {CODES[code]}"
        matching = [entry for entry in entries if entry.code == code]
        yield from (f"  {entry}" for entry in matching[:examples])
        if count > examples:
            yield f"  and {count - examples} more"
