"""From a shard's members to its samples: which members belong together, which count, and what is wrong with a group."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Optional

from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.records import DataError
from megatron_anymal.data.tar.reader import TarMember, TarPassed, TarProblem, TarWalk

# Bytes of a key that an index can hold (its column key_length).
MAX_KEY_BYTES = 65_535
TEXT_ENDINGS = ("txt", "json")


class SampleError(DataError):
    """A sample that cannot be used, with its code of the ledger."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass
class MemberCounts:
    """What became of a shard's members; `seen` is the sum of the others."""

    seen: int = 0
    used: int = 0
    bad: int = 0
    # What they have in common -> how many: an ending such as ".seg.png", or "directories".
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, other: MemberCounts) -> None:
        """Count another shard's members, too."""
        self.seen, self.used, self.bad = self.seen + other.seen, self.used + other.used, self.bad + other.bad
        self.ignored.update(other.ignored)

    def check(self, shard: str) -> None:
        """See that no member is unaccounted for."""
        ignored = sum(self.ignored.values())
        assert self.seen == self.used + self.bad + ignored, f"{shard}: {self} do not add up"


@dataclass
class Group:
    """Neighbouring members of one key."""

    key: str
    offset: int
    # Ending (lower case) -> member.
    members: dict[str, TarMember] = field(default_factory=dict)
    # All that were seen of it, unusable ones too.
    seen: int = 0
    wrong: Optional[SampleError] = None
    # Why a member of it may be missing.
    torn: str = ""

    def add(self, ending: str, member: TarMember) -> None:
        """Take a member in."""
        self.seen += 1
        if ending in self.members:
            self.refuse("duplicate_member", f"it has two members {ending!r}. Remove one, or rename it.")
        self.members[ending] = member

    def refuse(self, code: str, reason: str) -> None:
        """Note what is wrong with it; the first reason stands."""
        self.wrong = self.wrong or SampleError(code, reason)


def split_name(name: str) -> Optional[tuple[str, str]]:
    """A member's key and ending: the key reaches to the first dot of the file name, as in WebDataset.

    None for a file that is part of no sample: a hidden one, such as the `._` files that macOS adds, or one without an
    ending.
    """
    folder, _, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    if not stem or not dot:
        return None
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def groups(walk: TarWalk, shard: str, counts: MemberCounts, left_out: list[LeftOut]) -> Iterator[Group]:
    """A shard's members, grouped by key; what belongs to no group goes to `counts` and `left_out`."""
    current: Optional[Group] = None
    torn = ""
    for entry in walk:
        counts.seen += not isinstance(entry, TarProblem) or bool(entry.name)
        if isinstance(entry, TarPassed):
            counts.ignored[entry.what] += 1
            continue
        place = split_name(entry.name) if entry.name else None
        if isinstance(entry, TarMember) and place is None:
            counts.ignored["hidden files and files without an ending"] += 1
            continue
        if place is not None:
            key, ending = place
            if current is None or key != current.key:
                if current is not None:
                    yield current
                current, torn = Group(key, _offset(entry), torn=torn), ""
            _add(current, ending, entry)
        if isinstance(entry, TarProblem):
            if place is None or entry.code == "truncated":
                counts.bad += bool(entry.name) and place is None
                left_out.append(LeftOut(shard, entry.code, entry.reason, entry.offset, member=entry.name))
            if entry.tears or entry.code == "joined":
                torn = entry.reason if entry.tears else ""
                if current is not None:
                    current.torn = current.torn or torn
                    yield current
                current = None
    if current is not None:
        yield current


def _offset(entry: TarMember | TarProblem) -> int:
    return entry.header_offset if isinstance(entry, TarMember) else entry.offset


def _add(group: Group, ending: str, entry: TarMember | TarProblem) -> None:
    if isinstance(entry, TarProblem):
        group.seen += 1
        group.refuse(entry.code, f"its member {entry.name!r} {entry.reason}.")
        return
    group.add(ending, entry)
    if len(group.key) > MAX_KEY_BYTES // 4 and len(group.key.encode()) > MAX_KEY_BYTES:
        group.refuse("name", f"its key has more than {MAX_KEY_BYTES} bytes.")


@dataclass(frozen=True)
class MemberRule:
    """Which members of a sample count.

    Without patterns these are `.txt`, `.json` and, beside a `.txt`, files whose whole ending a modality reads
    (`key.jpg`, `key.thermal.npy`), also numbered (`key.0.jpg`); `key.seg.png` is no such file. With patterns, all
    members whose ending matches one of them, and no others.
    """

    patterns: Sequence[str] = ()
    # Endings that modalities read, and those that the user assigned a kind to.
    known: frozenset[str] = frozenset()
    assigned: frozenset[str] = frozenset()

    def counted(self, members: Mapping[str, TarMember]) -> dict[str, TarMember]:
        """Members that the patterns select; without patterns all."""
        if not self.patterns:
            return dict(members)
        return {ending: m for ending, m in members.items() if any(fnmatchcase(ending, p) for p in self.patterns)}

    def is_media(self, ending: str) -> bool:
        """Whether a member with this ending is media."""
        if ending in TEXT_ENDINGS:
            return False
        last = ending.rpartition(".")[2]
        whole = re.sub(r"^\d+\.", "", ending)
        return bool(self.patterns) or whole in self.known or last in self.assigned

    def media(self, members: Mapping[str, TarMember]) -> list[str]:
        """Endings of the media of a sample with a `.txt`, in the shard's order.

        Raises:
            SampleError: none of its members counts as media although there are some that might be meant.
        """
        found = [ending for ending in members if self.is_media(ending)]
        others = [ending for ending in members if ending not in found and ending not in TEXT_ENDINGS]
        if found or not others:
            return found
        last = others[0].rpartition(".")[2]
        if last in self.known:
            fix = f"If it is media, name the endings that count, for example --members {','.join(others)},txt"
        else:
            fix = f"If it is media, add --modality {last}=KIND; if not, name the endings that count with --members"
        raise SampleError("media", f"nothing of it counts as media, but it has a member .{others[0]}. {fix}.")
