"""Reading of a micro-batch's media into one tensor per modality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from megatron_anymal.data.planner import BatchPlanner
from megatron_anymal.data.records import DataError, Part, PlannedSample
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


class PieceReader:
    """Decodes media items directly into the tensor of their micro-batch."""

    def __init__(self, planner: BatchPlanner):
        self._planner = planner

    def read(
        self,
        modality: Modality,
        items: Sequence[PlannedItem],
        mine: slice,
        parts_of: Mapping[int, Sequence[Part]],
        bad: dict[int, str],
    ) -> Tensor:
        """Read a rank's share of the pieces.

        Args:
            mine: range of pieces to return, counted over the concatenated pieces of all items. Items without pieces in
                this range are not read.
            parts_of: position of a sample in the global batch -> its parts; samples that are missing are not read.
            bad: position of a sample -> why it could not be read; receives the samples that cannot be read here.

        Returns:
            [pieces, *piece_shape] float32; zeros for items that cannot be read.
        """
        batch = _new_batch((mine.stop - mine.start, *modality.piece_shape))
        rows, stop = batch.numpy(), 0
        for item in items:
            start, stop = stop, stop + item.pieces
            wanted = slice(max(mine.start, start) - start, min(mine.stop, stop) - start)
            if wanted.start >= wanted.stop:
                continue
            first = start + wanted.start - mine.start
            out = rows[first : first + wanted.stop - wanted.start]
            position = item.sample.position
            if position not in parts_of:
                out[...] = 0
                continue
            try:
                self._load(modality, item, parts_of[position], wanted, out)
            except (DataError, MediaError) as error:
                # Some of its pieces may have been written.
                out[...] = 0
                bad[position] = f"{self._planner.key(item.sample.dataset, item.sample.sample)}: {error}"
        return batch

    def _load(
        self, modality: Modality, item: PlannedItem, parts: Sequence[Part], wanted: slice, out: np.ndarray
    ) -> None:
        """Write the pieces `wanted` of an item to `out`."""
        index = self._planner.indexes[item.sample.dataset]
        [media] = index.read_media(item.sample.sample, parts, [item.number])
        whole = len(out) == item.pieces
        pieces = out if whole else np.empty((item.pieces, *modality.piece_shape), dtype=np.float32)
        try:
            modality.load_array(media.data, media.extension, media.part.attributes, pieces)
        except MediaError as error:
            raise MediaError(f"media {media.part.media!r} {error}") from None
        if not whole:
            out[...] = pieces[wanted]


def _new_batch(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised float32 tensor; in a loader process in shared memory, so that handing it over copies nothing."""
    if get_worker_info() is None or not math.prod(shape):
        # Unlike torch, numpy asks for huge pages, which take a third of the time to be touched first.
        return torch.from_numpy(np.empty(shape, dtype=np.float32))
    # As torch's own collation of samples does.
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * torch.float32.itemsize)
    return torch.empty(0).set_(storage).view(shape)
