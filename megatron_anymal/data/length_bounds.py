"""Bounds on the lengths of samples, by block, so that a run finds samples that are too long without reading every row.

Token counts are exact, but pieces of media depend on the run's modalities. A block's bound therefore has the largest
size of each kind of media, from which a run computes the most pieces. Only blocks whose bound exceeds the longest
sequence have to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_anymal.data.configured_modality import PlannedModality

# Samples per block.
BLOCK = 4000


def bound_type(kinds: int) -> np.dtype:
    """Type of a row of bounds.npy.

    Attributes:
        tokens: most tokens of a sample's documents together, without media.
        documents: most documents of a sample.
        media: [kinds] most media items of a sample, by kind.
        size: [kinds, 2] largest results of the modality's `probe`, by kind.
    """
    return np.dtype(
        [
            ("tokens", "<u8"),
            ("documents", "u1"),
            ("media", "<u2", (max(1, kinds),)),
            ("size", "<f8", (max(1, kinds), 2)),
        ]
    )


class BoundsBuilder:
    """Computes the bounds of an index while its rows are written."""

    def __init__(self, samples: int, kinds: int):
        """Start with bounds of zero.

        Args:
            samples: number of samples of the index.
            kinds: number of kinds of media in its header.
        """
        self.table = np.zeros(-(-samples // BLOCK), bound_type(kinds))
        self._kinds, self._seen = kinds, 0

    def add(self, samples: np.ndarray, media: np.ndarray) -> None:
        """Take further rows into account.

        Args:
            samples: [n] SAMPLE: the rows that follow those of the last call.
            media: [m] MEDIA: their media items.
        """
        block = (self._seen + np.arange(len(samples))) // BLOCK
        self._seen += len(samples)
        both = samples["tokens"].astype(np.uint64) + samples["rejected_tokens"]
        _raise_to(self.table["tokens"], block, both)
        documents = (samples["tokens"] > 0).astype(np.uint8) + (samples["rejected_tokens"] > 0)
        _raise_to(self.table["documents"], block, documents)
        owner = np.repeat(np.arange(len(samples)), samples["media_count"])
        for kind in range(self._kinds if len(media) else 0):
            mine = np.flatnonzero(media["kind"] == kind)
            _raise_to(self.table["media"][:, kind], block, np.bincount(owner[mine], minlength=len(samples)))
            _raise_to(self.table["size"][:, kind], block[owner[mine]], media["size"][mine])


def _raise_to(bounds: np.ndarray, block: np.ndarray, values: np.ndarray) -> None:
    """Raise the bounds of blocks to values; `block`, the block of each value, is in ascending order."""
    if not len(block):
        return
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    blocks = block[starts]
    bounds[blocks] = np.maximum(bounds[blocks], np.maximum.reduceat(values, starts, axis=0).astype(bounds.dtype))


@dataclass(frozen=True)
class LengthBounds:
    """The bounds of an index."""

    # [blocks] `bound_type`.
    table: np.ndarray
    # Samples per block.
    block: int

    def exceeding(self, seq_length: int, kinds: Sequence[str], modalities: Mapping[str, PlannedModality]) -> np.ndarray:
        """[blocks] bool: whether the bound of a block allows a sample that is longer than `seq_length`.

        Args:
            seq_length: in tokens.
            kinds: kinds of media of the index's header.
            modalities: those of the run, by kind; kinds that no sample has may be missing.
        """
        soft = np.zeros(len(self.table), np.int64)
        unknown = np.zeros(len(self.table), bool)
        for number, kind in enumerate(kinds):
            count, size = self.table["media"][:, number].astype(np.int64), self.table["size"][:, number]
            used = np.flatnonzero(count)
            if not len(used):
                continue
            planned = modalities[kind]
            if not planned.modality.pieces_grow_with_size:
                unknown[used] = True
                continue
            pieces = planned.modality.count_pieces(size[used]).astype(np.int64)
            soft[used] += count[used] * pieces * planned.soft_tokens_per_piece
            unknown[used] |= np.isnan(size[used]).any(axis=1)
        longest = self.table["tokens"].astype(np.int64) + self.table["documents"] * soft
        return unknown | (longest > seq_length)
