"""Batch planner: which samples each step uses and how they are packed, computed from the index alone.

The choice of samples does not depend on the number of ranks. Packs, replicas and micro-batches are layout only and do
not change the loss, because a step's loss is averaged over the target tokens of all its samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from megatron_anymal.config import FP8_MULTIPLE, DatasetConfig, LimitsConfig, ModelConfig
from megatron_anymal.data.configured_modality import PlannedModality
from megatron_anymal.data.context_parallel import document_multiple, padded
from megatron_anymal.data.global_order import GlobalOrder
from megatron_anymal.data.length_bounds import LengthBounds
from megatron_anymal.data.packing import pack
from megatron_anymal.data.records import SAMPLE_KINDS, DataError, PlannedMedia, PlannedMicroBatch, PlannedSample
from megatron_anymal.data.shard_index import ShardIndex, take_rows
from megatron_anymal.data.tokenizer import Tokenizer

# JSON keys that identify each kind of sample.
_MARK = {"parts": "`parts`", "messages": "`messages`", "preference": "`chosen` and `rejected`"}


@dataclass(frozen=True)
class BatchLayout:
    """Layout settings that affect packing."""

    # Number of replicas.
    data_parallel_size: int
    # Packs per forward pass and replica.
    micro_batch_size: int
    # Longest document and longest pack, in tokens.
    seq_length: int
    # Micro-batch lengths are multiples of this (sequence and context parallelism split the length evenly).
    length_multiple: int = 1
    # Document lengths within a pack are multiples of this (context parallelism splits each document).
    document_multiple: int = 1
    # The number of micro-batches per replica is a multiple of this (virtual pipelines run them in groups).
    micro_batches_multiple: int = 1

    @staticmethod
    def of(model: ModelConfig, seq_length: int, data_parallel_size: int) -> BatchLayout:
        """The layout that a configuration specifies.

        Args:
            seq_length: `data.seq_length`, the longest document and pack in tokens.
            data_parallel_size: replicas of the model.
        """
        multiple = document_multiple(model.context_parallel_size)
        virtual = model.virtual_pipeline_model_parallel_size > 1
        return BatchLayout(
            data_parallel_size=data_parallel_size,
            micro_batch_size=model.micro_batch_size,
            seq_length=seq_length,
            length_multiple=length_multiple(model),
            document_multiple=multiple,
            micro_batches_multiple=model.pipeline_model_parallel_size if virtual else 1,
        )


def length_multiple(model: ModelConfig) -> int:
    """The number that a micro-batch's length must be a multiple of.

    Context and sequence parallelism split the length evenly, and FP8 matrix products need a multiple of 16 tokens on
    each rank.
    """
    ranks = model.tensor_model_parallel_size if model.sequence_parallel else 1
    return document_multiple(model.context_parallel_size) * ranks * (FP8_MULTIPLE if model.fp8 else 1)


@dataclass(frozen=True)
class StepPlan:
    """A packed global batch. All arrays are indexed by the sample's position in the batch."""

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
    # Media items of each sample.
    media: tuple[tuple[PlannedMedia, ...], ...]
    # Positions of samples that are left out because they are longer than a pack.
    dropped: tuple[int, ...]
    # Positions of the samples of each micro-batch, by replica and micro-batch.
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    # Tokens per micro-batch after padding.
    padded_length: int
    # Document lengths within a pack are padded to a multiple of this.
    document_multiple: int

    @property
    def length(self) -> np.ndarray:
        """[n]: LLM tokens of each sample."""
        return self.documents.sum(axis=1)

    def of_replica(self, replica: int) -> tuple[PlannedMicroBatch, ...]:
        """The micro-batches of one data-parallel replica, in the order they run."""
        return tuple(
            PlannedMicroBatch(
                self.step, self.padded_length, tuple(self._sample(p) for p in positions), self.document_multiple
            )
            for positions in self.micro_batches[replica]
        )

    def _sample(self, place: int) -> PlannedSample:
        return PlannedSample(
            position=place,
            dataset=int(self.dataset[place]),
            sample=int(self.sample[place]),
            documents=tuple(int(length) for length in self.documents[place] if length),
            targets=int(self.targets[place]),
            media=self.media[place],
        )


@dataclass(frozen=True)
class Measures:
    """Lengths and costs of n samples with m media items in total, from the index."""

    # [n, 2]: LLM tokens of each sample's documents; 0 if there is no second document.
    documents: np.ndarray
    # [n]: target tokens of both documents.
    targets: np.ndarray
    # [n]: encoder cost of the sample's media, in input elements.
    costs: np.ndarray
    # [m]: row of each media item's sample.
    owner: np.ndarray
    # [m]: number of each media item's kind in the index.
    kind: np.ndarray
    # [m]: number of pieces of each media item.
    pieces: np.ndarray

    @property
    def length(self) -> np.ndarray:
        """[n]: LLM tokens."""
        return self.documents.sum(axis=1)


class BatchPlanner:
    """Plans any step of a mixture of datasets."""

    def __init__(
        self,
        datasets: Mapping[str, DatasetConfig],
        modalities: Sequence[PlannedModality],
        tokenizer: Tokenizer,
        layout: BatchLayout,
        *,
        global_batch_size: int,
        seed: int,
        too_long: str = "refuse",
        check_shards: bool = True,
        sample_kinds: Collection[str] = SAMPLE_KINDS,
        limits: Optional[LimitsConfig] = None,
        section: str = "data.train",
    ):
        """Open the indexes and check that the mixture can be planned.

        Args:
            sample_kinds: kinds of samples that the training objective accepts.
            limits: samples that exceed these limits are skipped and named when they are read. None: use the limits
                stored in each index.
            section: key of `datasets` in the configuration, for messages.

        Raises:
            DataError: there are no datasets; an index is missing, empty, built with another tokenizer, or contains
                samples of another kind or media without a configured modality; with too_long="refuse", a sample is
                longer than seq_length.
        """
        if not datasets:
            raise DataError("No dataset is configured. Name one, for example data.train.NAME.path=FOLDER.")
        self.names = list(datasets)
        self.indexes = []
        for name, dataset in datasets.items():
            try:
                self.indexes.append(ShardIndex(dataset.path, limits))
            except DataError as error:
                raise DataError(f"{section}.{name}.path: {error}") from None
        self.layout, self.global_batch_size = layout, global_batch_size
        self.seed, self.too_long = seed, too_long
        self._weights = tuple(d.weight for d in datasets.values())
        self._by_kind = {m.kind: m for m in modalities}
        for index in self.indexes:
            self._check_index(index, tokenizer, sample_kinds)
            if check_shards:
                index.check_shards()
        self._order = GlobalOrder(tuple(len(i) for i in self.indexes), self._weights, seed)
        if too_long == "refuse":
            self._refuse_long()

    def fingerprint(self) -> str:
        """Hash of everything that determines which samples a step uses."""
        body = {
            "indexes": [[i.header.to_json(len(i), len(i.media))] for i in self.indexes],
            "weights": self._weights,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
        }
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def key(self, dataset: int, sample: int) -> str:
        """Name of a sample: dataset/key."""
        return f"{self.names[dataset]}/{self.indexes[dataset].key(sample)}"

    def plan(self, step: int) -> StepPlan:
        """Plan a step. The result is a pure function of the index, the configuration and the step."""
        start = step * self.global_batch_size
        dataset, sample = self._order.samples(start, start + self.global_batch_size)
        documents = np.zeros((len(sample), 2), np.int64)
        targets, costs = np.zeros(len(sample), np.int64), np.zeros(len(sample))
        media: list[tuple[PlannedMedia, ...]] = [()] * len(sample)
        for number, index in enumerate(self.indexes):
            positions = np.flatnonzero(dataset == number)
            if len(positions):
                measures = self.measure(index, sample[positions])
                documents[positions], targets[positions] = measures.documents, measures.targets
                costs[positions] = measures.costs
                for position, items in zip(positions, self._items(index, measures)):
                    media[position] = items
        fits = documents.sum(axis=1) <= self.layout.seq_length
        targets[~fits] = 0
        in_pack = padded(documents, self.layout.document_multiple).sum(axis=1)
        micro_batches = self._lay_out(np.flatnonzero(fits), in_pack, costs)
        longest = max(sum(int(in_pack[p]) for p in positions) for replica in micro_batches for positions in replica)
        return StepPlan(
            step=step,
            dataset=dataset,
            sample=sample,
            documents=documents,
            targets=targets,
            media=tuple(media),
            dropped=tuple(int(p) for p in np.flatnonzero(~fits)),
            micro_batches=micro_batches,
            padded_length=padded(max(1, longest), self.layout.length_multiple),
            document_multiple=self.layout.document_multiple,
        )

    def _lay_out(
        self, places: np.ndarray, length: np.ndarray, costs: np.ndarray
    ) -> tuple[tuple[tuple[int, ...], ...], ...]:
        replicas, size = self.layout.data_parallel_size, self.layout.micro_batch_size
        multiple = replicas * size * self.layout.micro_batches_multiple
        # Padding the documents of a pair can slightly exceed seq_length. Which samples count as too long must not
        # depend on the layout, so the capacity grows instead.
        capacity = max(self.layout.seq_length, int(length[places].max(initial=0)))
        packs = pack(length[places], costs[places], capacity, multiple)
        # Packs are sorted by load, so that replicas process similar loads at the same time.
        groups = [packs[i : i + size] for i in range(0, len(packs), size)]
        merged = [tuple(sorted(int(places[i]) for p in group for i in p)) for group in groups]
        return tuple(tuple(merged[replica::replicas]) for replica in range(replicas))

    def measure(self, index: ShardIndex, sample: np.ndarray) -> Measures:
        """Lengths and costs of samples of one dataset, computed without a loop over samples.

        Args:
            sample: [n] row numbers.
        """
        rows = take_rows(index.samples, sample)
        documents, targets = index.lengths(sample)
        has = documents > 0
        counts = rows["media_count"].astype(np.int64)
        owner = np.repeat(np.arange(len(sample)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        media = take_rows(index.media, np.repeat(rows["media_start"].astype(np.int64), counts) + within)
        costs = np.zeros(len(sample))
        pieces = np.zeros(len(media), np.int64)
        for number, kind in enumerate(index.header.kinds):
            mine = np.flatnonzero(media["kind"] == number)
            if len(mine):
                planned = self._by_kind[kind]
                pieces[mine] = planned.modality.count_pieces(media["size"][mine])
                # Sums of integers, which are exact in float64.
                of_sample = np.bincount(owner[mine], pieces[mine], len(sample))
                # Each document of a sample contains all its media, but they are encoded only once.
                documents += has * (of_sample.astype(np.int64) * planned.soft_tokens_per_piece)[:, None]
                costs += of_sample * planned.cost_per_piece
        return Measures(documents, targets.sum(axis=1), costs, owner, media["kind"], pieces)

    def _items(self, index: ShardIndex, measures: Measures) -> list[tuple[PlannedMedia, ...]]:
        """Media items of each sample."""
        names = [self._by_kind[kind].name for kind in index.header.kinds]
        numbers = list(zip(measures.kind.tolist(), measures.pieces.tolist()))
        # Most items are alike and share one object.
        planned = {(kind, pieces): PlannedMedia(names[kind], pieces) for kind, pieces in set(numbers)}
        items = [planned[number] for number in numbers]
        ends = np.cumsum(np.bincount(measures.owner, minlength=len(measures.targets))).tolist()
        return [tuple(items[start:end]) for start, end in zip([0, *ends], ends)]

    def _check_index(self, index: ShardIndex, tokenizer: Tokenizer, sample_kinds: Collection[str]) -> None:
        strange = set(index.sample_kinds()) - set(sample_kinds)
        if strange:
            raise DataError(
                f"{index.folder!r} contains samples with {_MARK[min(strange)]}, but this run trains on samples with "
                f"{' or '.join(_MARK[kind] for kind in SAMPLE_KINDS if kind in sample_kinds)}. Use another folder."
            )
        missing = index.kinds_used() - set(self._by_kind)
        if missing:
            raise DataError(
                f"{index.folder!r} contains {', '.join(sorted(missing))}, for which no modality is configured "
                f"(configured: {', '.join(sorted(self._by_kind)) or 'none'}). Add model.modalities.{min(missing)}."
            )
        if index.header.tokenizer != tokenizer.fingerprint():
            raise DataError(
                f"The index in {index.folder!r} was built with a different tokenizer than data.tokenizer. "
                f"Rebuild it: anymal prepare --index-only {index.folder} --tokenizer {tokenizer.hf.name_or_path}"
            )

    def _refuse_long(self) -> None:
        for number, index in enumerate(self.indexes):
            for rows in self._doubtful_rows(index):
                length = self.measure(index, rows).length
                if (length > self.layout.seq_length).any():
                    too_long = int((length > self.layout.seq_length).sum())
                    worst = int(length.argmax())
                    raise DataError(
                        f"{too_long} sample(s) of dataset {self.names[number]!r} are longer than data.seq_length="
                        f"{self.layout.seq_length}; the longest is {self.key(number, int(rows[worst]))!r} with "
                        f"{int(length[worst])} tokens. Raise data.seq_length, or set data.too_long=drop to leave "
                        "them out (media are never cut)."
                    )

    def _doubtful_rows(self, index: ShardIndex, rows_at_once: int = 1_000_000) -> Iterator[np.ndarray]:
        """Row numbers of the samples that may be longer than `seq_length` by the index's bounds, in ascending order."""
        bounds = index.bounds
        # An index of an earlier version has no bounds: all of its rows are read.
        doubtful = np.ones(1, bool) if bounds is None else self._exceeding(index, bounds)
        block = len(index) if bounds is None else bounds.block
        for start in range(0, len(index), rows_at_once):
            stop = min(start + rows_at_once, len(index))
            if doubtful[start // block : -(-stop // block)].any():
                rows = np.arange(start, stop)
                yield rows[doubtful[rows // block]]

    def _exceeding(self, index: ShardIndex, bounds: LengthBounds) -> np.ndarray:
        return bounds.exceeding(self.layout.seq_length, index.header.kinds, self._by_kind)
