"""Bounds on the lengths of samples, by block, so that a run finds samples that are too long without reading every row.

Token counts are exact, but pieces of media depend on the run's modalities. The samples of a block are grouped by their
numbers of documents and of media items of each kind, and a group's bound has the largest size of each kind of media,
from which a run computes the most pieces. Only blocks with a bound above the longest sequence have to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_anymal.data.codes import NO_CODES, PlannedCodes
from megatron_anymal.data.configured_modality import PlannedModality

# Samples per block.
BLOCK = 4000
# A block with more groups has a single bound, with the maximum of each number.
MAX_GROUPS = 32


def bound_type(kinds: int) -> np.dtype:
    """Type of a row of bounds.npy, which is about one group of a block.

    Attributes:
        block: number of the block.
        tokens: maximum number of tokens in a sample's documents together, without media.
        documents: documents of a sample.
        media: [kinds] media items of a sample, by kind.
        size: [kinds, 2] largest results of the modality's `probe`, by kind.
    """
    kinds = max(1, kinds)
    numbers = [("block", "<u4"), ("tokens", "<u8"), ("documents", "u1")]
    return np.dtype([*numbers, ("media", "<u2", (kinds,)), ("size", "<f8", (kinds, 2))])


class BoundsBuilder:
    """Computes the bounds of an index while its rows are written."""

    def __init__(self, kinds: int):
        """Start with no rows.

        Args:
            kinds: number of kinds of media in the index's header.
        """
        self._kinds, self._seen = kinds, 0
        self._done: list[np.ndarray] = []
        # The groups of the last block, by their documents and media.
        self._groups: dict[bytes, np.ndarray] = {}
        self._many = False

    def add(self, samples: np.ndarray, media: np.ndarray) -> None:
        """Take further rows into account.

        Args:
            samples: [n] SAMPLE: the rows that follow those of the last call.
            media: [m] MEDIA: their media items.
        """
        ends = np.cumsum(samples["media_count"], dtype=np.int64)
        start = 0
        while start < len(samples):
            stop = min(len(samples), start + BLOCK - self._seen % BLOCK)
            first = int(ends[start - 1]) if start else 0
            self._add_to_block(samples[start:stop], media[first : int(ends[stop - 1])])
            self._seen += stop - start
            start = stop
            if self._seen % BLOCK == 0:
                self._finish_block()

    def table(self) -> np.ndarray:
        """[rows] `bound_type`, in the order of the blocks."""
        self._finish_block()
        return np.concatenate([np.zeros(0, bound_type(self._kinds)), *self._done])

    def _add_to_block(self, samples: np.ndarray, media: np.ndarray) -> None:
        owner = np.repeat(np.arange(len(samples)), samples["media_count"])
        numbers = np.zeros((1 + self._kinds, len(samples)), np.int64)
        numbers[0] = (samples["tokens"] > 0).astype(np.int64) + (samples["rejected_tokens"] > 0)
        for kind in range(self._kinds if len(media) else 0):
            numbers[1 + kind] = np.bincount(owner[media["kind"] == kind], minlength=len(samples))
        group = _grouped(numbers)
        self._many |= group.max() >= MAX_GROUPS
        group = np.zeros_like(group) if self._many else group
        tokens = samples["tokens"].astype(np.int64) + samples["rejected_tokens"]
        for number in range(group.max() + 1):
            mine = group == number
            bound = np.zeros(1, bound_type(self._kinds))
            bound["tokens"], bound["documents"] = tokens[mine].max(), numbers[0, mine].max()
            of_group = mine[owner]
            for kind in range(self._kinds):
                bound["media"][0, kind] = numbers[1 + kind, mine].max()
                sizes = media["size"][of_group & (media["kind"] == kind)]
                bound["size"][0, kind] = sizes.max(axis=0, initial=0)
            key = bound["documents"].tobytes() + bound["media"].tobytes()
            self._groups[key] = _larger(self._groups[key], bound) if key in self._groups else bound

    def _finish_block(self) -> None:
        bounds = [self._groups[key] for key in sorted(self._groups)]
        if self._many or len(bounds) > MAX_GROUPS:
            merged = bounds[0]
            for bound in bounds[1:]:
                merged = _larger(merged, bound)
            bounds = [merged]
        for bound in bounds:
            bound["block"] = (self._seen - 1) // BLOCK
        self._done += bounds
        self._groups, self._many = {}, False


def _grouped(numbers: np.ndarray) -> np.ndarray:
    """[n]: a number from 0 for each distinct column of `numbers`, [rows, n]."""
    group = np.zeros(numbers.shape[1], np.int64)
    for row in numbers:
        if (row != row[0]).any():
            group = np.unique(group * (row.max() + 1) + row, return_inverse=True)[1]
    return group


def _larger(bound: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The larger number of two bounds in each column."""
    larger = bound.copy()
    for name in bound.dtype.names or ():
        larger[name] = np.maximum(bound[name], other[name])
    return larger


@dataclass(frozen=True)
class LengthBounds:
    """The bounds of an index."""

    # [rows] `bound_type`, in the order of the blocks.
    table: np.ndarray
    # Samples per block.
    block: int

    def cover(self, samples: int) -> bool:
        """Whether there is a bound for each block of so many samples."""
        blocks = self.table["block"].astype(np.int64)
        last = (samples - 1) // self.block
        return bool(len(blocks) and blocks[-1] == last and (np.diff(blocks, prepend=-1) < 2).all())

    def exceeding(
        self,
        seq_length: int,
        kinds: Sequence[str],
        modalities: Mapping[str, PlannedModality],
        codes: Mapping[str, PlannedCodes] = NO_CODES,
    ) -> np.ndarray:
        """[blocks] bool: whether a bound of a block allows a sample that is longer than `seq_length`.

        Args:
            seq_length: in tokens.
            kinds: kinds of media of the index's header.
            modalities: those of the run, by kind; kinds that no sample has may be missing.
            codes: those of model.discrete, likewise.
        """
        soft = np.zeros(len(self.table), np.int64)
        unknown = np.zeros(len(self.table), bool)
        for number, kind in enumerate(kinds):
            count, size = self.table["media"][:, number].astype(np.int64), self.table["size"][:, number]
            used = np.flatnonzero(count)
            if not len(used):
                continue
            if kind in codes:
                soft[used] += count[used] * codes[kind].tokens(size[used, 0])
                continue
            planned = modalities[kind]
            if not planned.modality.pieces_grow_with_size:
                unknown[used] = True
                continue
            pieces = planned.modality.count_pieces(size[used]).astype(np.int64)
            soft[used] += count[used] * pieces * planned.soft_tokens_per_piece
            unknown[used] |= np.isnan(size[used]).any(axis=1)
        longest = self.table["tokens"].astype(np.int64) + self.table["documents"] * soft
        blocks = np.zeros(int(self.table["block"].max(initial=0)) + 1, bool)
        blocks[self.table["block"][unknown | (longest > seq_length)]] = True
        return blocks
