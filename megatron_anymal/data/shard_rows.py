"""The rows that one shard adds to the index, collected as bytes while the shard is read."""

from __future__ import annotations

import math
import struct
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_anymal.data.global_order import scramble
from megatron_anymal.data.index_format import MEDIA, SAMPLE
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.shard_samples import MemberCounts

HASH = np.dtype("<u8")
# Bytes of keys that are hashed together; more than the longest key has.
_HASHED_BYTES = 2**20
# Ledger code of samples that were left out because they have no media although others do.
LOST_MEDIA = "no_media"
# struct's codes of the types of columns.
_CODES = {"|u1": "B", "<u2": "H", "<u4": "I", "<u8": "Q", "<f8": "d"}


def _packer(table: np.dtype) -> struct.Struct:
    """Packs the values of a row, in the order of the columns; assigning them to an array takes ten times longer."""
    columns = [table[name] for name in table.names or ()]
    return struct.Struct("<" + "".join(_CODES[column.base.str] * math.prod(column.shape) for column in columns))


_SAMPLE_ROW, _MEDIA_ROW = _packer(SAMPLE), _packer(MEDIA)


@dataclass
class ShardRows:
    """The rows that one shard adds to the index, and the entries that it leaves out."""

    # File name of the shard.
    name: str
    # Size of the shard in bytes.
    size: int
    # When it was last modified, as its file system states it; empty if that is not known.
    modified: str = ""
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

    def key_hashes(self) -> np.ndarray:
        """[n] HASH: `hash_keys` of the keys."""
        return hash_keys(self.keys, self.samples["key_offset"], self.samples["key_length"])

    @property
    def text_with_media(self) -> bool:
        """Whether a sample that is described by a .txt has media."""
        return bool(((self.samples["text_is_json"] == 0) & (self.samples["media_count"] > 0)).any())

    def without_lost_media(self) -> ShardRows:
        """The rows without samples that have only a .txt: if other .txt samples have media, theirs seem to be lost."""
        lost = np.flatnonzero((self.samples["text_is_json"] == 0) & (self.samples["media_count"] == 0)).tolist()
        reason = "it has no media although other samples do. If text-only samples are intended, add --text-only."
        return self.without(lost, LOST_MEDIA, reason) if lost else self

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
        return replace(
            self,
            samples=self.samples[kept],
            left_out=[*self.left_out, *left_out],
            members=members,
        )


def hash_keys(keys: bytes, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Numbers that are equal for equal keys, and different for others but by rare chance.

    Args:
        keys: concatenated keys.
        offsets: [n] where each key begins, in bytes.
        lengths: [n] length of each key in bytes, not 0.

    Returns:
        [n] HASH.
    """
    data = np.frombuffer(keys, np.uint8)
    hashes = np.empty(len(lengths), HASH)
    at_once = _HASHED_BYTES // int(lengths.max(initial=1))
    for start in range(0, len(lengths), at_once):
        some = slice(start, start + at_once)
        hashes[some] = _hashed(data, offsets[some].astype(np.int64), lengths[some].astype(np.int64))
    return hashes


def _hashed(data: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum of the scrambled words of each key, where a word is 8 bytes (the last one padded with zeros)."""
    words = -(-lengths // 8)
    first = np.cumsum(words) - words
    padded = np.zeros(int(words.sum()) * 8, np.uint8)
    width = int(lengths[0])
    if (lengths == width).all() and (np.diff(offsets) == width).all():
        # The usual case, which needs no index of each byte.
        start, stop = int(offsets[0]), int(offsets[-1]) + width
        padded.reshape(len(lengths), -1)[:, :width] = data[start:stop].reshape(-1, width)
    else:
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        padded[np.repeat(first * 8, lengths) + within] = data[np.repeat(offsets, lengths) + within]
    position = np.arange(len(padded) // 8) - np.repeat(first, words)
    scrambled = scramble(padded.view(HASH), scramble(position.astype(HASH), np.uint64(1)))
    return scramble(np.add.reduceat(scrambled, first), lengths.astype(HASH))


def _hashes_of(keys: Sequence[bytes]) -> np.ndarray:
    lengths = np.array([len(key) for key in keys], np.int64)
    return hash_keys(b"".join(keys), np.cumsum(lengths) - lengths, lengths)


def repeated(hashes: np.ndarray) -> np.ndarray:
    """The values that occur more than once, [k] HASH in ascending order."""
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


@dataclass(frozen=True)
class Recurring:
    """A sample whose key occurs again in its shard."""

    # Key of the sample.
    key: str
    # Number of times that the key occurs.
    occurrences: int
    # Offset of the sample's first member in the shard.
    start: int
    # Number of the sample's members.
    members: int


class RowBuffer:
    """The rows of a shard's usable samples: about 100 bytes per sample and 40 per media item."""

    def __init__(self) -> None:
        self._samples, self._media, self._keys = bytearray(), bytearray(), bytearray()
        # Per sample: offset of its first member, and position in `_uses` of the members that it uses and ignores.
        self._starts, self._use = array("Q"), array("I")
        self._uses: dict[tuple[int, tuple[str, ...]], int] = {}

    def add(
        self,
        key: str,
        start: int,
        sample: Sequence[int],
        media: Sequence[Sequence[Any]],
        used: int,
        ignored: tuple[str, ...],
    ) -> None:
        """Add a sample.

        Args:
            start: offset of its first member in the shard.
            sample: the columns of SAMPLE from text_offset to rejected_targets.
            media: the columns of MEDIA for each item; `size` is two values.
            used: number of its members that are in the index.
            ignored: endings of its other members.
        """
        encoded = key.encode()
        media_start, key_offset = len(self._media) // MEDIA.itemsize, len(self._keys)
        self._samples += _SAMPLE_ROW.pack(0, *sample, media_start, len(media), key_offset, len(encoded))
        for item in media:
            self._media += _MEDIA_ROW.pack(*item)
        self._keys += encoded
        self._starts.append(start)
        self._use.append(self._uses.setdefault((used, ignored), len(self._uses)))

    def recurring(self, others: Iterable[str]) -> dict[int, Recurring]:
        """Samples whose key occurs again in the shard, by row number.

        Args:
            others: keys of samples that are not in the rows.
        """
        counts = Counter(others)
        samples = np.frombuffer(self._samples, SAMPLE)
        hashes = hash_keys(bytes(self._keys), samples["key_offset"], samples["key_length"])
        elsewhere = _hashes_of([key.encode() for key in counts])
        suspects = np.flatnonzero(np.isin(hashes, np.concatenate([repeated(hashes), elsewhere]))).tolist()
        keys = {number: self._key(number) for number in suspects}
        counts.update(keys.values())
        members = [used + len(ignored) for used, ignored in self._uses]
        return {
            number: Recurring(key, counts[key], self._starts[number], members[self._use[number]])
            for number, key in keys.items()
            if counts[key] > 1
        }

    def move_to(self, rows: ShardRows, dropped: Collection[int]) -> None:
        """Set the tables of `rows` and count the members of the samples, except for the samples `dropped`."""
        rows.samples, rows.media = np.frombuffer(self._samples, SAMPLE), np.frombuffer(self._media, MEDIA)
        rows.keys = bytes(self._keys)
        uses = np.array(self._use)
        if dropped:
            kept = np.ones(len(rows.samples), bool)
            kept[list(dropped)] = False
            rows.keys = b"".join(self._key(number).encode() for number in np.flatnonzero(kept).tolist())
            rows.media = rows.media[np.repeat(kept, rows.samples["media_count"])]
            rows.samples, uses = rows.samples[kept], uses[kept]
            for first, length in (("key_offset", "key_length"), ("media_start", "media_count")):
                lengths = rows.samples[length].astype(np.int64)
                rows.samples[first] = np.cumsum(lengths) - lengths
        self._count(uses, rows.members)

    def _key(self, number: int) -> str:
        row = np.frombuffer(self._samples, SAMPLE)[number]
        start = int(row["key_offset"])
        return self._keys[start : start + int(row["key_length"])].decode()

    def _count(self, uses: np.ndarray, members: MemberCounts) -> None:
        """Count the members of samples from their positions in `_uses`."""
        known = list(self._uses)
        numbers, first, counts = np.unique(uses, return_index=True, return_counts=True)
        # In the order of the samples, which decides between equally frequent endings in index.json.
        for position in np.argsort(first).tolist():
            used, ignored = known[numbers[position]]
            members.used += used * int(counts[position])
            for ending in ignored:
                members.ignored[ending] += int(counts[position])
