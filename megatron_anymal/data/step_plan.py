"""A planned step: the samples of a global batch, their lengths and media, and the micro-batches of each replica."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import numpy as np

from megatron_anymal.data.records import PlannedMedia, PlannedMicroBatch, PlannedSample
from megatron_anymal.data.shared_prompts import span_lengths
from megatron_anymal.data.stage_shares import StageShares


@dataclass(frozen=True)
class BatchMedia:
    """The m media items of a batch of n samples, in the order of the samples and of their parts."""

    # Names of modalities in the configuration.
    names: tuple[str, ...]
    # [n + 1] int64: the items of sample i are [start[i], start[i + 1]).
    start: np.ndarray
    # [m] int64: position of each item's modality in `names`.
    modality: np.ndarray
    # [m] int64: pieces of each item.
    pieces: np.ndarray

    def of(self, position: int) -> tuple[PlannedMedia, ...]:
        """Media items of the sample at a position of the batch."""
        items = slice(int(self.start[position]), int(self.start[position + 1]))
        numbers = zip(self.modality[items].tolist(), self.pieces[items].tolist())
        return tuple(PlannedMedia(self.names[modality], pieces) for modality, pieces in numbers)

    def first_modality(self) -> np.ndarray:
        """[n] int64: position in `names` of the modality of each sample's first item; -1 without media."""
        # A sample at the end may start behind the last item.
        modality = np.append(self.modality, -1)[self.start[:-1]]
        return np.where(self.start[1:] > self.start[:-1], modality, -1)


@dataclass(frozen=True)
class StepPlan:
    """A packed global batch. All arrays are indexed by the sample's position in the batch.

    Samples become objects only for the replica that reads them.
    """

    # Step number, counted from 0.
    step: int
    # [n] int64: dataset of each sample.
    dataset: np.ndarray
    # [n] int64: its position in the dataset.
    sample: np.ndarray
    # [n, 2]: LLM tokens of the only or chosen document, and of the rejected document of a preference pair (0 if none).
    documents: np.ndarray
    # [n]: target tokens of both documents; 0 for a dropped sample.
    targets: np.ndarray
    # Media items of the samples.
    media: BatchMedia
    # Positions of samples that are left out because they are longer than a pack.
    dropped: tuple[int, ...]
    # Positions of the samples of each micro-batch, by replica and micro-batch.
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    # Tokens per micro-batch after padding.
    padded_length: int
    # Lengths of spans within a pack are padded to a multiple of this.
    document_multiple: int
    # [n]: tokens of the prompt that both documents of a pair share in a pack; 0 for all other samples.
    shared: np.ndarray
    # How pipeline stages share the encoding; None: the first one does all of it.
    stage_shares: Optional[StageShares] = None
    # [n] int64: position of each sample's alignment in model.multiplex; None: all are of one.
    alignment: Optional[np.ndarray] = None

    @property
    def length(self) -> np.ndarray:
        """[n]: LLM tokens that each sample takes in a pack."""
        return span_lengths(self.documents, self.shared).sum(axis=1)

    @property
    def tokens(self) -> int:
        """LLM tokens of all samples that are not left out."""
        length = self.length
        return int(length.sum() - length[list(self.dropped)].sum())

    def of_replica(self, replica: int) -> tuple[PlannedMicroBatch, ...]:
        """The micro-batches of one data-parallel replica, in the order they run."""
        planned = tuple(
            PlannedMicroBatch(
                self.step, self.padded_length, tuple(self._sample(p) for p in positions), self.document_multiple
            )
            for positions in self.micro_batches[replica]
        )
        return planned if self.stage_shares is None else self.stage_shares.assign(planned)

    def in_order(self) -> Iterator[tuple[PlannedMicroBatch, ...]]:
        """The micro-batches that the replicas run at the same time, in the order they run."""
        return zip(*(self.of_replica(replica) for replica in range(len(self.micro_batches))))

    def _sample(self, position: int) -> PlannedSample:
        return PlannedSample(
            position=position,
            dataset=int(self.dataset[position]),
            sample=int(self.sample[position]),
            documents=tuple(int(length) for length in self.documents[position] if length),
            targets=int(self.targets[position]),
            media=self.media.of(position),
            shared=int(self.shared[position]),
        )
