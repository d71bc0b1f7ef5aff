"""Batch planner: which samples each step uses and how they are packed, computed from the index alone.

The choice of samples does not depend on the number of ranks. Packs, replicas and micro-batches are layout only and do
not change the loss, because a step's loss is averaged over the target tokens of all its samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Optional

import numpy as np

from megatron_anymal.config import (
    AlignmentConfig,
    DatasetConfig,
    DiscreteConfig,
    LimitsConfig,
    ModelConfig,
    StageConfig,
    StorageConfig,
)
from megatron_anymal.data.aligned_samples import AlignedSamples
from megatron_anymal.data.codes import PlannedCodes, plan_kinds
from megatron_anymal.data.configured_modality import PlannedModality
from megatron_anymal.data.context_parallel import document_multiple, padded
from megatron_anymal.data.length_bounds import LengthBounds
from megatron_anymal.data.mix_stages import StagedOrder, mean_tokens, plan_stages
from megatron_anymal.data.packing import pack
from megatron_anymal.data.records import SAMPLE_KINDS, DataError
from megatron_anymal.data.sample_measures import Measures, measure_samples
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.shared_prompts import span_lengths
from megatron_anymal.data.stage_shares import StageShares
from megatron_anymal.data.step_plan import BatchMedia, StepPlan
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
    # Longest sample and longest pack, in tokens.
    seq_length: int
    # Micro-batch lengths are multiples of this (sequence and context parallelism split the length evenly).
    length_multiple: int = 1
    # Lengths of spans within a pack are multiples of this (context parallelism splits each of them).
    document_multiple: int = 1
    # The number of micro-batches per replica is a multiple of this (virtual pipelines run them in groups).
    micro_batches_multiple: int = 1
    # Packs hold the prompt of a preference pair once (data/shared_prompts.py).
    shared_prompts: bool = False

    @staticmethod
    def of(
        model: ModelConfig, seq_length: int, data_parallel_size: int, *, shared_prompts: bool = False
    ) -> BatchLayout:
        """The layout that a configuration specifies.

        Args:
            seq_length: `data.seq_length`, the longest document and pack in tokens.
            data_parallel_size: replicas of the model.
            shared_prompts: see `data.shared_prompts.shares_prompts`.
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
            shared_prompts=shared_prompts,
        )


def length_multiple(model: ModelConfig) -> int:
    """The number that a micro-batch's length must be a multiple of.

    Context and sequence parallelism split the length evenly, and matrix products in FP8 or NVFP4 need a multiple of 16
    or 32 tokens on each rank.
    """
    ranks = model.tensor_model_parallel_size if model.sequence_parallel else 1
    return document_multiple(model.context_parallel_size) * ranks * model.product_multiple


def _open(
    datasets: Mapping[str, DatasetConfig],
    limits: Optional[LimitsConfig],
    storage: Optional[StorageConfig],
    section: str,
) -> list[ShardIndex]:
    indexes = []
    for name, dataset in datasets.items():
        try:
            indexes.append(ShardIndex(dataset.path, limits, storage))
        except DataError as error:
            raise DataError(f"{section}.{name}.path: {error}") from None
    return indexes


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
        storage: Optional[StorageConfig] = None,
        section: str = "data.train",
        discrete: Mapping[str, DiscreteConfig] = MappingProxyType({}),
        schedule: Sequence[StageConfig] = (),
        alignments: Mapping[str, AlignmentConfig] = MappingProxyType({}),
    ):
        """Open the indexes and check that the mixture can be planned.

        Args:
            sample_kinds: kinds of samples that the training objective accepts.
            limits: samples that exceed these limits are skipped and named when they are read. None: use the limits
                stored in each index.
            storage: how folders on object storage are read. None: the defaults.
            section: key of `datasets` in the configuration, for messages.
            discrete: `model.discrete`.
            schedule: `data.schedule`, checked against `datasets`. Empty: the datasets' own weights throughout.
            alignments: `model.multiplex`, checked against `datasets`. Empty: one alignment of all of them.

        Raises:
            DataError: there are no datasets; an index is missing, empty, built with another tokenizer, or contains
                samples of another kind, media without a configured modality, media of another alignment's modality or
                codes that `discrete` does not fit; with too_long="refuse", a sample is longer than seq_length; a stage
                by tokens cannot be planned.
            StorageError: an object store, or the cache for its indexes, cannot be used.
        """
        if not datasets:
            raise DataError("No dataset is configured. Name one, for example data.train.NAME.path=FOLDER.")
        self.names = list(datasets)
        self.indexes = _open(datasets, limits, storage, section)
        self.layout, self.global_batch_size = layout, global_batch_size
        self.seed, self.too_long = seed, too_long
        self._by_kind = {m.kind: m for m in modalities}
        self._stage_shares: Optional[StageShares] = None
        # Kind of the index -> lengths of its items of codes.
        self._codes: dict[str, PlannedCodes] = {}
        for index in self.indexes:
            self._codes.update(plan_kinds(index.kinds_used(), discrete, repr(index.folder)))
            self._check_index(index, tokenizer, sample_kinds)
            if check_shards:
                index.check_shards()
        if too_long == "refuse":
            self._refuse_long()
        # At least one: without a schedule, the whole run is a stage.
        self.stages = plan_stages(datasets, schedule, global_batch_size, self._mean_tokens)
        self._order = StagedOrder([len(i) for i in self.indexes], self.stages, seed)
        self._aligned = self._align(datasets, alignments, section) if alignments else None

    def _align(
        self, datasets: Mapping[str, DatasetConfig], alignments: Mapping[str, AlignmentConfig], section: str
    ) -> AlignedSamples:
        # Validations go on until the run ends.
        ends, sizes = section == "data.train", [len(index) for index in self.indexes]
        aligned = AlignedSamples(datasets, sizes, alignments, self.seed, ends=ends)
        modality_of = {kind: modality.name for kind, modality in self._by_kind.items()}
        aligned.check_media(self.indexes, modality_of, [f"{section}.{name}.path" for name in self.names])
        return aligned

    @property
    def read_ahead(self) -> int:
        """Micro-batches that a loader process requests ahead from object storage; 0 if all folders are local."""
        return max((index.remote.settings.read_ahead for index in self.indexes if index.remote), default=0)

    def fingerprint(self) -> str:
        """Hash of everything that determines which samples a step uses, apart from what is in them (`content`)."""
        body = {
            "indexes": [[i.header.to_json(len(i), len(i.media))] for i in self.indexes],
            "weights": self.stages[0].weights,
            **({"later": [(stage.start, stage.weights) for stage in self.stages[1:]]} if self.stages[1:] else {}),
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            **({"alignments": self._aligned.identity()} if self._aligned else {}),
            # Then more pairs fit into a pack and fewer are left out.
            **({"shared_prompts": True} if self.layout.shared_prompts and self.too_long == "drop" else {}),
        }
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def content(self) -> str:
        """Hash of the keys, texts and media of all datasets; empty if an index was built before it recorded one."""
        contents = [index.content for index in self.indexes]
        return hashlib.sha256("".join(contents).encode()).hexdigest() if all(contents) else ""

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples at positions [start, stop) of a run without `alignments`: dataset and row number, [stop - start]
        int64 each."""
        return self._order.samples(start, stop)

    def stage_of(self, step: int) -> int:
        """Number of the stage in `stages` that a step belongs to; steps count from 0."""
        return self._order.stage_at(step * self.global_batch_size)

    def steps_of(self, stage: int, max_steps: int) -> range:
        """The steps of a stage, which count from 0, in a run of `max_steps` steps."""
        starts = [*(stage.start // self.global_batch_size for stage in self.stages), max_steps]
        return range(starts[stage], starts[stage + 1])

    def key(self, dataset: int, sample: int) -> str:
        """Name of a sample: dataset/key."""
        return f"{self.names[dataset]}/{self.indexes[dataset].key(sample)}"

    @property
    def encoder_costs(self) -> dict[str, float]:
        """Cost of one piece by modality, by which packs are balanced."""
        return {m.name: m.cost_per_piece for m in self._by_kind.values()}

    def use_encoder_costs(self, costs: Mapping[str, float]) -> None:
        """Balance encoder work by these costs from now on.

        Args:
            costs: cost of one piece by modality, in any unit; the same on every rank.
        """
        self._by_kind = {kind: dataclasses.replace(m, cost=costs[m.name]) for kind, m in self._by_kind.items()}

    def share_encoding(self, shares: StageShares) -> None:
        """Plan which pipeline stage encodes which media from now on; the same on every rank."""
        self._stage_shares = shares

    def plan(self, step: int) -> StepPlan:
        """Plan a step. The result is a pure function of the index, the configuration, encoder costs and the step."""
        dataset, sample = self._samples_of(step)
        documents = np.zeros((len(sample), 2), np.int64)
        targets, costs, shared = (np.zeros(len(sample), np.int64) for _ in range(3))
        measured = []
        for number, index in enumerate(self.indexes):
            positions = np.flatnonzero(dataset == number)
            # In the order of the rows, which takes less time to read.
            positions = positions[np.argsort(sample[positions])]
            if len(positions):
                measures = self.measure(index, sample[positions])
                documents[positions], targets[positions] = measures.documents, measures.targets
                costs[positions], shared[positions] = measures.costs, measures.shared
                measured.append((positions, measures))
        spans = span_lengths(documents, shared)
        fits = spans.sum(axis=1) <= self.layout.seq_length
        targets[~fits] = 0
        micro_batches, padded_length = self._lay_out(np.flatnonzero(fits), spans, costs)
        return StepPlan(
            step=step,
            dataset=dataset,
            sample=sample,
            documents=documents,
            targets=targets,
            media=self._media(measured, len(sample)),
            dropped=tuple(np.flatnonzero(~fits).tolist()),
            micro_batches=micro_batches,
            padded_length=padded_length,
            document_multiple=self.layout.document_multiple,
            shared=shared,
            stage_shares=self._stage_shares,
            alignment=None if self._aligned is None else self._aligned.owner[dataset],
        )

    def _samples_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if self._aligned is not None:
            return self._aligned.samples(step)
        start = step * self.global_batch_size
        return self.samples(start, start + self.global_batch_size)

    def _lay_out(
        self, positions: np.ndarray, spans: np.ndarray, costs: np.ndarray
    ) -> tuple[tuple[tuple[tuple[int, ...], ...], ...], int]:
        """Micro-batches of each replica, and their padded length."""
        replicas = self.layout.data_parallel_size
        length = padded(spans[positions], self.layout.document_multiple).sum(axis=1)
        # Padding the spans of a pair can slightly exceed seq_length. Which samples count as too long must not
        # depend on the layout, so the capacity grows instead.
        longest = max(self.layout.seq_length, int(length.max(initial=0)))
        packs = pack(
            length,
            costs[positions],
            # Attention stays within documents, so the packs of a micro-batch are one long pack.
            longest * self.layout.micro_batch_size,
            replicas * self.layout.micro_batches_multiple,
            replicas=replicas,
            length_multiple=self.layout.length_multiple,
        )
        position_of, length_of = positions.tolist(), length.tolist()
        merged = [tuple(map(position_of.__getitem__, chosen)) for chosen in packs]
        most = max(sum(map(length_of.__getitem__, chosen)) for chosen in packs)
        micro_batches = tuple(tuple(merged[replica::replicas]) for replica in range(replicas))
        return micro_batches, padded(max(1, most), self.layout.length_multiple)

    def measure(self, index: ShardIndex, sample: np.ndarray) -> Measures:
        """Lengths and costs of samples of one dataset; see `measure_samples`.

        Args:
            sample: [n] row numbers.
        """
        return measure_samples(index, sample, self._by_kind, self._codes, shared_prompts=self.layout.shared_prompts)

    def _mean_tokens(self, number: int) -> float:
        index = self.indexes[number]
        return mean_tokens(partial(self.measure, index), len(index), self.layout.seq_length)

    def _media(self, measured: Sequence[tuple[np.ndarray, Measures]], samples: int) -> BatchMedia:
        """Put the media items of all datasets in the order of the samples.

        Args:
            measured: positions of samples of one dataset, [n] int64, and their measures.
            samples: number of samples of all datasets.
        """
        counts = np.zeros(samples, np.int64)
        for positions, measures in measured:
            counts[positions] = np.bincount(measures.owner, minlength=len(positions))
        start = np.append(0, np.cumsum(counts))
        modality, pieces = np.empty(start[-1], np.int64), np.empty(start[-1], np.int64)
        for positions, measures in measured:
            own = counts[positions]
            # How far each item moves: its sample's first item goes to the start of the sample's position.
            rows = np.arange(len(measures.owner)) + (start[positions] - (np.cumsum(own) - own))[measures.owner]
            modality[rows], pieces[rows] = measures.modality, measures.pieces
        names = *(m.name for m in self._by_kind.values()), *(c.name for c in self._codes.values())
        return BatchMedia(names, start, modality, pieces)

    def _check_index(self, index: ShardIndex, tokenizer: Tokenizer, sample_kinds: Collection[str]) -> None:
        strange = set(index.sample_kinds()) - set(sample_kinds)
        if strange:
            raise DataError(
                f"{index.folder!r} contains samples with {_MARK[min(strange)]}, but this run trains on samples with "
                f"{' or '.join(_MARK[kind] for kind in SAMPLE_KINDS if kind in sample_kinds)}. Use another folder."
            )
        missing = index.kinds_used() - set(self._by_kind) - set(self._codes)
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
        return bounds.exceeding(self.layout.seq_length, index.header.kinds, self._by_kind, self._codes)
