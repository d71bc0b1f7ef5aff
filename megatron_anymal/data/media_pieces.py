"""Reading of a micro-batch's media into one tensor per modality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from megatron_anymal.data.batch_memory import batch_tensor
from megatron_anymal.data.feature_cache import FeatureCache, PieceKey, item_digest
from megatron_anymal.data.micro_batch import CachedFeatures
from megatron_anymal.data.planner import BatchPlanner
from megatron_anymal.data.records import DataError, Part, PlannedSample
from megatron_anymal.data.shard_index import MediaBytes
from megatron_anymal.modalities.base import MediaError, Modality


@dataclass(frozen=True)
class PlannedItem:
    """A media item of a planned sample."""

    # The sample.
    sample: PlannedSample
    # Number of the item, counted over the sample's media.
    number: int
    # Number of its pieces according to the index.
    pieces: int


@dataclass(frozen=True)
class WantedPieces:
    """Some pieces of a media item."""

    # The item.
    item: PlannedItem
    # Numbers of the pieces, ascending.
    numbers: Sequence[int]

    @property
    def whole(self) -> bool:
        """Whether these are all pieces of the item."""
        return len(self.numbers) == self.item.pieces


def pieces_in(items: Sequence[PlannedItem], mine: slice) -> Iterator[WantedPieces]:
    """The pieces in a range that is counted over the concatenated pieces of all items, by item."""
    stop = 0
    for item in items:
        start, stop = stop, stop + item.pieces
        numbers = range(max(mine.start, start) - start, min(mine.stop, stop) - start)
        if numbers:
            yield WantedPieces(item, numbers)


class PieceReader:
    """Decodes media items directly into the tensor of their micro-batch, or reads their features from a cache."""

    def __init__(self, planner: BatchPlanner):
        self._planner = planner

    def read(
        self,
        modality: Modality,
        wanted: Sequence[WantedPieces],
        parts_of: Mapping[int, Sequence[Part]],
        bad: dict[int, str],
    ) -> Tensor:
        """Decode pieces.

        Args:
            parts_of: position of a sample in the global batch -> its parts; samples that are missing are not read.
            bad: position of a sample -> why it could not be read; receives the samples that cannot be read here.

        Returns:
            [pieces, *piece_shape] float32; zeros for items that cannot be read.
        """
        batch = batch_tensor((sum(len(pieces.numbers) for pieces in wanted), *modality.piece_shape), torch.float32)
        rows, stop = batch.numpy(), 0
        for pieces in wanted:
            start, stop = stop, stop + len(pieces.numbers)
            out, sample = rows[start:stop], pieces.item.sample
            if sample.position not in parts_of:
                out[...] = 0
                continue
            try:
                self._load(modality, pieces, parts_of[sample.position], out)
            except (DataError, MediaError) as error:
                # Some of its pieces may have been written.
                out[...] = 0
                bad[sample.position] = f"{self._planner.key(sample.dataset, sample.sample)}: {error}"
        return batch

    def read_cached(
        self,
        modality: Modality,
        cache: FeatureCache,
        wanted: Sequence[WantedPieces],
        parts_of: Mapping[int, Sequence[Part]],
        bad: dict[int, str],
    ) -> tuple[Tensor, CachedFeatures]:
        """Read features from a cache, and decode only the pieces that are not in it.

        Args:
            parts_of: as for `read`.
            bad: as for `read`.

        Returns:
            The decoded pieces, [m, *piece_shape] float32 as `read` returns them, and the features of the others,
            [h, feature tokens, width].
        """
        keys = [key for pieces in wanted for key in self._keys(pieces, parts_of)]
        rows = batch_tensor((len(keys), *cache.shape), cache.dtype)
        known: list[int] = []
        for number, key in enumerate(keys):
            if key is not None and cache.read(key, rows[len(known)]):
                known.append(number)
        missing = sorted(set(range(len(keys))) - set(known))
        batch = self.read(modality, _remaining(wanted, missing), parts_of, bad)
        owners = [pieces.item.sample.position for pieces in wanted for _ in pieces.numbers]
        # Zeros stand for what could not be read.
        good = [keys[n] if owners[n] not in bad else None for n in missing]
        known_at, missing_at = (torch.tensor(at, dtype=torch.int64) for at in (known, missing))
        return batch, CachedFeatures(rows[: len(known)], known_at, missing_at, tuple(good))

    def _keys(self, pieces: WantedPieces, parts_of: Mapping[int, Sequence[Part]]) -> list[Optional[PieceKey]]:
        """Keys of an item's pieces; None if it cannot be read, which `read` will report."""
        item = pieces.item
        parts = parts_of.get(item.sample.position)
        try:
            digest = "" if parts is None else item_digest(self._media(item, parts))
        except DataError:
            digest = ""
        return [PieceKey(digest, item.pieces, number) if digest else None for number in pieces.numbers]

    def _media(self, item: PlannedItem, parts: Sequence[Part]) -> MediaBytes:
        index = self._planner.indexes[item.sample.dataset]
        [media] = index.read_media(item.sample.sample, parts, [item.number])
        return media

    def _load(self, modality: Modality, wanted: WantedPieces, parts: Sequence[Part], out: np.ndarray) -> None:
        """Write pieces of an item to `out`."""
        media = self._media(wanted.item, parts)
        whole = wanted.whole
        pieces = out if whole else np.empty((wanted.item.pieces, *modality.piece_shape), dtype=np.float32)
        try:
            modality.load_array(media.data, media.extension, media.part.attributes, pieces)
        except MediaError as error:
            raise MediaError(f"media {media.part.media!r} {error}") from None
        if not whole:
            out[...] = pieces[list(wanted.numbers)]


def _remaining(wanted: Sequence[WantedPieces], missing: Sequence[int]) -> list[WantedPieces]:
    """The pieces at some positions, counted over the concatenated pieces, by item."""
    left, remaining, stop = set(missing), [], 0
    for pieces in wanted:
        start, stop = stop, stop + len(pieces.numbers)
        numbers = [number for position, number in zip(range(start, stop), pieces.numbers) if position in left]
        if numbers:
            remaining.append(WantedPieces(pieces.item, numbers))
    return remaining
