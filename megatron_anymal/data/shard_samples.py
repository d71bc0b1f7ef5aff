"""Grouping of a shard's members into samples: which members belong together, which are used, and what is wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Optional

from megatron_anymal.data.content_parts import is_codes
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.records import DataError
from megatron_anymal.data.tar.reader import TarMember, TarPassed, TarProblem, TarWalk

# Longest key in bytes that an index can store (column key_length).
MAX_KEY_BYTES = 65_535
TEXT_ENDINGS = ("txt", "json")
# Answers that a rule keeps.
_MOST_ENDINGS = 1000


class SampleError(DataError):
    """A sample that cannot be used, with its ledger code."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass
class MemberCounts:
    """Counts of a shard's members; `seen` is the sum of the others."""

    # All members.
    seen: int = 0
    # Members that are in the index.
    used: int = 0
    # Members that should be in the index but cannot be used.
    bad: int = 0
    # Counts by ending, such as ".seg.png", or by description, such as "directories".
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, other: MemberCounts) -> None:
        """Add the counts of another shard."""
        self.seen, self.used, self.bad = self.seen + other.seen, self.used + other.used, self.bad + other.bad
        self.ignored.update(other.ignored)

    def check(self, shard: str) -> None:
        """Check that every member is accounted for."""
        ignored = sum(self.ignored.values())
        assert self.seen == self.used + self.bad + ignored, f"{shard}: {self} do not add up"


@dataclass
class Group:
    """Consecutive members with the same key."""

    # Key of the sample.
    key: str
    # Bytes from the start of the shard to the first member.
    offset: int
    # Ending (lower case) -> member.
    members: dict[str, TarMember] = field(default_factory=dict)
    # Number of members, including unusable ones.
    seen: int = 0
    # Why the group cannot be used; None if it can.
    wrong: Optional[SampleError] = None
    # Reason why members may be missing.
    torn: str = ""

    def add(self, ending: str, member: TarMember) -> None:
        """Add a member."""
        self.seen += 1
        if ending in self.members:
            self.refuse("duplicate_member", f"it has two members {ending!r}. Remove one, or rename it.")
        self.members[ending] = member

    def refuse(self, code: str, reason: str) -> None:
        """Record why the group cannot be used; the first reason is kept."""
        self.wrong = self.wrong or SampleError(code, reason)


def split_name(name: str) -> Optional[tuple[str, str]]:
    """Split a member's name into key and ending at the first dot of the file name, as WebDataset does.

    Returns None for a file that does not belong to a sample: a hidden file, such as the `._` files of macOS, or a file
    without an ending.
    """
    folder, _, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    if not stem or not dot:
        return None
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def groups(walk: TarWalk, shard: str, counts: MemberCounts, left_out: list[LeftOut]) -> Iterator[Group]:
    """Group a shard's members by key; members that belong to no group are recorded in `counts` and `left_out`."""
    current: Optional[Group] = None
    torn = ""
    for entry in walk:
        counts.seen += not isinstance(entry, TarProblem) or bool(entry.name)
        if isinstance(entry, TarPassed):
            counts.ignored[entry.what] += 1
            continue
        key_and_ending = split_name(entry.name) if entry.name else None
        if isinstance(entry, TarMember) and key_and_ending is None:
            counts.ignored["hidden files and files without an ending"] += 1
            continue
        if key_and_ending is not None:
            key, ending = key_and_ending
            if current is None or key != current.key:
                if current is not None:
                    yield current
                current, torn = Group(key, _offset(entry), torn=torn), ""
            _add(current, ending, entry)
        if isinstance(entry, TarProblem):
            if key_and_ending is None or entry.code == "truncated":
                counts.bad += bool(entry.name) and key_and_ending is None
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
    """Selects the members of a sample that are used.

    Without patterns these are `.txt`, `.json` and, together with a `.txt`, files whose complete ending is read by a
    modality (`key.jpg`, `key.thermal.npy`), optionally numbered (`key.0.jpg`); `key.seg.png` does not qualify. With
    patterns, they are exactly the members whose ending matches one of the patterns.
    """

    # Patterns of the endings to use; empty: the default rule.
    patterns: Sequence[str] = ()
    # Endings that modalities read.
    known: frozenset[str] = frozenset()
    # Endings with a kind assigned by the user.
    assigned: frozenset[str] = frozenset()
    # The answers of `is_media`: endings are few, and it is asked for every member.
    _media: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    def counted(self, members: Mapping[str, TarMember]) -> dict[str, TarMember]:
        """The members that match the patterns; all members if there are no patterns."""
        if not self.patterns:
            return dict(members)
        return {ending: m for ending, m in members.items() if any(fnmatchcase(ending, p) for p in self.patterns)}

    def is_media(self, ending: str) -> bool:
        """Whether a member with this ending is a media file."""
        known = self._media.get(ending)
        if known is None:
            if len(self._media) >= _MOST_ENDINGS:
                self._media.clear()
            known = self._media[ending] = self._is_media(ending)
        return known

    def _is_media(self, ending: str) -> bool:
        if ending in TEXT_ENDINGS:
            return False
        last = ending.rpartition(".")[2]
        whole = re.sub(r"^\d+\.", "", ending)
        return bool(self.patterns) or whole in self.known or last in self.assigned or is_codes(whole)

    def media(self, members: Mapping[str, TarMember]) -> list[str]:
        """Endings of the media of a sample with a `.txt`, in the order of the shard.

        Raises:
            SampleError: no member counts as media although the sample has further members that may be intended as such.
        """
        media = [ending for ending in members if self.is_media(ending)]
        others = [ending for ending in members if ending not in media and ending not in TEXT_ENDINGS]
        if media or not others:
            return media
        last = others[0].rpartition(".")[2]
        if last in self.known:
            fix = f"If it is media, select the endings to use, for example --members {','.join(others)},txt"
        else:
            fix = f"If it is media, add --modality {last}=KIND; if not, select the endings to use with --members"
        raise SampleError("media", f"none of its members is recognized as media, but it has .{others[0]}. {fix}.")
