"""Micro-batch loading: turns planned micro-batches into tensors, reading only the byte ranges that the rank needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.data.configured_modality import LoadedModality
from megatron_anymal.data.content_parts import name_modalities, with_tokens
from megatron_anymal.data.context_parallel import held_tokens, padded
from megatron_anymal.data.feature_cache import FeatureCache
from megatron_anymal.data.loader_workers import LoaderMemory, ReadMicroBatch, WorkerReader, death_behind, start_worker
from megatron_anymal.data.media_pieces import PieceReader, PlannedItem, pieces_in
from megatron_anymal.data.micro_batch import MediaBatch, MicroBatch, positions_with_label
from megatron_anymal.data.plan_queue import PlanSampler
from megatron_anymal.data.planner import BatchPlanner
from megatron_anymal.data.records import (
    CodesPart,
    DataError,
    MediaPart,
    PlannedMedia,
    PlannedMicroBatch,
    PlannedSample,
    Sample,
)
from megatron_anymal.data.shared_prompts import prompts_of, spans_of
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.data.tokenizer import Document, Tokenizer
from megatron_anymal.modalities.base import MediaError
from megatron_anymal.object_storage.byte_ranges import ByteRange
from megatron_anymal.object_storage.errors import StorageError


@dataclass(frozen=True)
class RankNeeds:
    """The data that a rank reads, given its position in the parallel layout."""

    # Whether the rank needs tokens and labels: the first and the last pipeline stage do; the stages in between need
    # only lengths.
    text: bool
    # Whether the rank puts media into the Llama's input: only the first pipeline stage does. It also encodes those that
    # the plan gives to no other stage.
    media: bool
    # Pipeline stage.
    stage: int = 0
    # Rank in the tensor-parallel group.
    tensor_rank: int = 0
    # Tensor-parallel size.
    tensor_size: int = 1
    # Rank in the context-parallel group.
    context_rank: int = 0
    # Context-parallel size.
    context_size: int = 1


class MicroBatchReader(Dataset[MicroBatch]):
    """Reads planned micro-batches. The result depends only on the plan, so any worker can read any micro-batch."""

    def __init__(
        self,
        planner: BatchPlanner,
        tokenizer: Tokenizer,
        modalities: Mapping[str, LoadedModality],
        needs: RankNeeds,
        codes: Optional[CodeLayout] = None,
    ):
        self._codes = codes
        self._planner, self._tokenizer = planner, tokenizer
        self._modalities, self._needs = modalities, needs
        self._pieces = PieceReader(planner)
        self._placeholders = {name: m.placeholder for name, m in modalities.items()}
        self._remote = any(index.remote for index in planner.indexes)
        # Byte ranges of micro-batches that were requested from object storage, by dataset.
        self._requested: dict[PlannedMicroBatch, dict[int, list[ByteRange]]] = {}
        self._caches: Mapping[str, FeatureCache] = {}

    def use_caches(self, caches: Mapping[str, FeatureCache]) -> None:
        """Read features from caches, by the modality's name, instead of media. To be called before `steps`."""
        self._caches = caches

    def request(self, plan: PlannedMicroBatch) -> None:
        """Start to read a micro-batch's bytes from object storage, unless that has happened. They stay in memory until
        the micro-batch is read, which must follow."""
        if not self._remote or plan in self._requested:
            return
        self._requested[plan] = ranges = self._byte_ranges(plan)
        for dataset, wanted in ranges.items():
            self._planner.indexes[dataset].request(wanted)

    def _byte_ranges(self, plan: PlannedMicroBatch) -> dict[int, list[ByteRange]]:
        """What this rank reads from object storage for a micro-batch, by dataset."""
        encoded = self._encoded_here(plan)
        if not self._needs.text and not encoded:
            return {}
        # Position of a sample -> numbers of its media items; codes are part of the text.
        media = {
            sample.position: [n for n, item in enumerate(sample.media) if item.modality not in self._modalities]
            for sample in plan.samples
        }
        for name in encoded:
            stop = 0
            items = _items_of(plan, name)
            mine = self._share(sum(item.pieces for item in items))[1]
            for item in items:
                start, stop = stop, stop + item.pieces
                if max(start, mine.start) < min(stop, mine.stop):
                    media[item.sample.position].append(item.number)
        ranges: dict[int, list[ByteRange]] = {}
        for sample in plan.samples:
            index = self._planner.indexes[sample.dataset]
            if index.remote:
                wanted = index.byte_ranges(sample.sample, sorted(media[sample.position]))
                ranges.setdefault(sample.dataset, []).extend(wanted)
        return ranges

    def __getitem__(self, plan: PlannedMicroBatch) -> MicroBatch:
        """Read a micro-batch. A sample that cannot be read is listed in `bad` and keeps its span of tokens.

        Raises:
            StorageError: an object store cannot be used, which no sample is to blame for.
        """
        if not self._remote:
            return self._read(plan)
        self.request(plan)
        try:
            return self._read(plan)
        finally:
            for dataset, ranges in self._requested.pop(plan, {}).items():
                self._planner.indexes[dataset].release(ranges)

    def _read(self, plan: PlannedMicroBatch) -> MicroBatch:
        lengths = [padded(length, plan.document_multiple) for s in plan.samples for length in s.spans]
        padding = plan.padded_length - sum(lengths)
        branch = torch.full((1, plan.padded_length), -1, dtype=torch.int64)
        micro_batch = MicroBatch(
            plan=plan,
            document_lengths=tuple(lengths) + ((padding,) if padding else ()),
            tokens=torch.full((1, plan.padded_length), self._tokenizer.end, dtype=torch.int64),
            labels=torch.zeros(1, plan.padded_length, dtype=torch.int64),
            loss_mask=torch.zeros(1, plan.padded_length),
            sample_positions=torch.full((1, plan.padded_length), -1, dtype=torch.int64),
            media={},
            bad={},
            branch=branch,
            prompts=prompts_of(plan),
        )
        encoded = self._encoded_here(plan)
        parts_of: dict[int, list[MediaPart]] = {}
        for sample, spans in zip(plan.samples, spans_of(plan)):
            for number, span in enumerate(spans):
                micro_batch.sample_positions[0, span] = sample.position
                # The first span of three is the prompt.
                branch[0, span] = max(0, number - 1) if sample.shared else number
            if self._needs.text or encoded:
                try:
                    parts_of[sample.position] = self._fill_text(micro_batch, sample, spans)
                except DataError as error:
                    micro_batch.bad[sample.position] = str(error)
                    self._hold_positions(micro_batch, sample, spans)
        self._fill_media(micro_batch, parts_of, encoded)
        if self._needs.context_size > 1:
            micro_batch = self._own_part(micro_batch)
        micro_batch.label_index = positions_with_label(micro_batch.loss_mask)
        return micro_batch

    def _own_part(self, micro_batch: MicroBatch) -> MicroBatch:
        """The tokens of a micro-batch that this context-parallel rank holds."""
        held = held_tokens(micro_batch.document_lengths, self._needs.context_rank, self._needs.context_size)
        local_index = torch.full((micro_batch.tokens.size(1),), -1)
        local_index[held] = torch.arange(len(held))
        media = {}
        for name, batch in micro_batch.media.items():
            local = local_index[batch.token_index]
            mine = (local >= 0).nonzero().flatten()
            soft = mine if batch.soft_index is None else batch.soft_index[mine]
            media[name] = dataclasses.replace(batch, token_index=local[mine], soft_index=soft)
        names = ("tokens", "labels", "loss_mask", "sample_positions", "branch")
        tensors = {name: getattr(micro_batch, name)[:, held] for name in names}
        return dataclasses.replace(micro_batch, media=media, **tensors)

    def _fill_text(self, micro_batch: MicroBatch, sample: PlannedSample, spans: Sequence[slice]) -> list[MediaPart]:
        """Write a sample's documents into the micro-batch.

        Returns:
            The sample's media.
        """
        read = self._planner.indexes[sample.dataset].sample(sample.sample)
        # From here on, media parts carry the modality's name in the configuration.
        numbers = read.item_numbers()
        named = [
            name_modalities(parts, [sample.media[n].modality for n in own])
            for parts, own in zip(read.documents, numbers)
        ]
        media = Sample(read.kind, tuple(named)).media
        tokens = self._tokens_of_codes(sample, media)
        documents = [
            self._tokenizer.document(
                with_tokens(parts, [tokens.get(n) for n in own]),
                [self._soft_tokens(sample.media[n]) for n in own if n not in tokens],
                self._placeholders,
                closed=read.closed,
            )
            for parts, own in zip(named, numbers)
        ]
        lengths = tuple(len(document.tokens) for document in documents)
        if lengths != sample.documents or sum(sum(document.is_target) for document in documents) != sample.targets:
            raise DataError(
                f"{self._planner.key(sample.dataset, sample.sample)}: it has {sum(lengths)} tokens, but the index "
                f"states {sample.length}. Rebuild the index with `anymal prepare --rebuild --index-only`."
            )
        starts = [document.tokens[: sample.shared] for document in documents]
        if any(start != starts[0] for start in starts[1:]):
            raise DataError(
                f"{self._planner.key(sample.dataset, sample.sample)}: data.tokenizer splits the prompt in different "
                "ways before its two answers. Set model.dpo.share_prompt=never."
            )
        if sample.shared:
            _write(micro_batch, documents[0], 0, spans[0])
        for document, span in zip(documents, spans[-len(documents) :]):
            _write(micro_batch, document, sample.shared, span)
        return media

    def _soft_tokens(self, planned: PlannedMedia) -> int:
        return planned.pieces * self._modalities[planned.modality].soft_tokens_per_piece

    def _tokens_of_codes(self, sample: PlannedSample, media: Sequence[MediaPart]) -> dict[int, tuple[int, ...]]:
        """Token ids of a sample's items of codes, by their numbers among its media."""
        items = {number: part for number, part in enumerate(media) if isinstance(part, CodesPart)}
        if not items:
            return {}
        assert self._codes is not None, "the planner has refused codes without model.discrete"
        tokens = {}
        read = self._planner.indexes[sample.dataset].read_media(sample.sample, media, list(items))
        for (number, part), item in zip(items.items(), read):
            try:
                tokens[number] = self._codes.tokens(part.modality, item.data, generated=part.generated)
            except MediaError as error:
                key = self._planner.key(sample.dataset, sample.sample)
                raise DataError(f"{key}: media {part.media!r} {error}.") from None
        return tokens

    def _hold_positions(self, micro_batch: MicroBatch, sample: PlannedSample, spans: Sequence[slice]) -> None:
        """Write placeholders for an unreadable sample's media, so that shapes still agree across ranks."""
        for start in (span.start for span in (spans[:1] if sample.shared else spans)):
            for planned in sample.media:
                if planned.modality not in self._modalities:
                    continue
                entry = self._modalities[planned.modality]
                stop = start + planned.pieces * entry.soft_tokens_per_piece
                micro_batch.tokens[0, start:stop] = entry.placeholder
                start = stop

    def _encoded_here(self, plan: PlannedMicroBatch) -> list[str]:
        """The modalities of a micro-batch that this pipeline stage encodes."""
        names = {item.modality for sample in plan.samples for item in sample.media}
        needs, stages = self._needs, {name: plan.encoder_stage(name) for name in self._modalities if name in names}
        return [name for name, stage in stages.items() if (stage == needs.stage if stage else needs.media)]

    def _fill_media(
        self, micro_batch: MicroBatch, parts_of: Mapping[int, list[MediaPart]], encoded: Sequence[str]
    ) -> None:
        """Add the media of the modalities in `encoded`, and on the first stage those without pieces of all others."""
        for name, entry in self._modalities.items():
            items = _items_of(micro_batch.plan, name)
            if not items or not (self._needs.media or name in encoded):
                continue
            needs = self._needs
            shares, mine = self._share(sum(item.pieces for item in items))
            wanted, features = list(pieces_in(items, mine)) if name in encoded else [], None
            if name in encoded and name in self._caches:
                cache = self._caches[name]
                pieces, features = self._pieces.read_cached(entry.modality, cache, wanted, parts_of, micro_batch.bad)
            else:
                pieces = self._pieces.read(entry.modality, wanted, parts_of, micro_batch.bad)
            micro_batch.media[name] = MediaBatch(
                pieces=pieces,
                shares=tuple(shares[i : i + needs.tensor_size] for i in range(0, len(shares), needs.tensor_size)),
                token_index=torch.nonzero(micro_batch.tokens[0] == entry.placeholder).flatten(),
                soft_index=_shared_soft_tokens(micro_batch.plan, name, entry.soft_tokens_per_piece),
                features=features,
            )

    def _share(self, pieces: int) -> tuple[tuple[int, ...], slice]:
        """Number of pieces that each rank encodes, and the range of this rank."""
        needs = self._needs
        shares = share_out(pieces, needs.context_size * needs.tensor_size)
        own = needs.context_rank * needs.tensor_size + needs.tensor_rank
        first = sum(shares[:own])
        return shares, slice(first, first + shares[own])


def _write(micro_batch: MicroBatch, document: Document, first: int, span: slice) -> None:
    """Write a document's tokens from `first` on into a span. A token's label is the document's next one, if any."""
    length = span.stop - span.start
    tokens = torch.tensor(document.tokens[first : first + length + 1])
    labelled = slice(span.start, span.start + len(tokens) - 1)
    micro_batch.tokens[0, span] = tokens[:length]
    micro_batch.labels[0, labelled] = tokens[1:]
    micro_batch.loss_mask[0, labelled] = torch.tensor(document.is_target[first + 1 : first + len(tokens)]).float()


def _items_of(plan: PlannedMicroBatch, name: str) -> list[PlannedItem]:
    """Media items of a modality, in the order of the samples."""
    return [
        PlannedItem(sample, number, planned.pieces)
        for sample in plan.samples
        for number, planned in enumerate(sample.media)
        if planned.modality == name
    ]


def _shared_soft_tokens(plan: PlannedMicroBatch, name: str, per_piece: int) -> Optional[Tensor]:
    """[k]: the soft token for each placeholder of the modality, as `MediaBatch.soft_index`; None if each
    is used once."""
    copies = [1 if sample.shared else len(sample.documents) for sample in plan.samples]
    if all(count == 1 for count in copies):
        return None
    indexes, stop = [], 0
    for sample, count in zip(plan.samples, copies):
        start, stop = stop, stop + per_piece * sum(m.pieces for m in sample.media if m.modality == name)
        indexes += [torch.arange(start, stop)] * count
    return torch.cat(indexes)


def share_out(pieces: int, ranks: int) -> tuple[int, ...]:
    """Number of pieces that each rank encodes, split as evenly as possible."""
    return tuple(pieces * (rank + 1) // ranks - pieces * rank // ranks for rank in range(ranks))


def steps(
    planner: BatchPlanner,
    reader: MicroBatchReader,
    *,
    replica: int,
    start: int,
    stop: int,
    num_workers: int,
    prefetch_steps: int,
    pin: bool = False,
    before_read: Optional[Callable[[int, int], None]] = None,
    memory: Optional[LoaderMemory] = None,
) -> Iterator[tuple[StepPlan, list[MicroBatch]]]:
    """The steps [start, stop) of one replica, prefetched by worker processes.

    The result does not depend on the number of workers, because each worker reads whole planned micro-batches. If one
    outgrows its limit, no further steps are handed out; the workers read those that were, and end as they do after the
    last step. New ones begin with the next step.

    Args:
        pin: return micro-batches in pinned memory, which allows asynchronous copies to the GPU. A thread of this
            process pins what the workers have read. Without workers nothing is pinned, since the training thread would
            have to do it.
        before_read: called in a worker before it reads a micro-batch, with the worker's id and the step (from 0).
        memory: keeps the memory of the workers, and holds their limit.

    Raises:
        StorageError: an object store cannot be read; see ObjectClient.cat_file.
        WorkerDied: a worker process has exited. torch can also report this elsewhere; see `worker_died`.
        RuntimeError, ConnectionError, EOFError: raised by a reader, or by torch's loader while all workers are alive.
    """
    if start >= stop:
        return
    per_step = len(planner.plan(start).micro_batches[replica])
    while start < stop:
        sampler = PlanSampler(planner, replica, start, stop, num_workers, planner.read_ahead)
        loader: DataLoader[ReadMicroBatch | StorageError] = DataLoader(
            WorkerReader(reader, before_read),
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            # Not the default start method of the calling process: workers watch for the exit of their parent, which
            # must be this process.
            multiprocessing_context="fork" if num_workers else None,
            prefetch_factor=max(1, -(-prefetch_steps * per_step // num_workers)) if num_workers else None,
            pin_memory=pin and num_workers > 0,
            worker_init_fn=start_worker,
            # For the workers' base seed. Drawing it from torch's global generator would advance that at each start, and
            # change the random numbers that plug-ins draw.
            generator=torch.Generator(),
        )
        for plan, micro_batches in _by_step(_read(loader, sampler, memory), sampler, replica):
            start = plan.step + 1
            yield plan, micro_batches


def _by_step(
    batches: Iterator[MicroBatch], sampler: PlanSampler, replica: int
) -> Iterator[tuple[StepPlan, list[MicroBatch]]]:
    first: Optional[MicroBatch] = next(batches, None)
    while first is not None:
        plan = sampler.plans.popleft()
        rest = [next(batches) for _ in range(len(plan.micro_batches[replica]) - 1)]
        yield plan, [first, *rest]
        first = next(batches, None)


def _read(
    loader: DataLoader[ReadMicroBatch | StorageError], sampler: PlanSampler, memory: Optional[LoaderMemory]
) -> Iterator[MicroBatch]:
    iterator = iter(loader)
    try:
        for read in iterator:
            if isinstance(read, StorageError):
                raise read
            if memory is not None and read.memory is not None and memory.note(read.memory):
                sampler.ended = True
            yield read.micro_batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        died = death_behind(error, getattr(iterator, "_workers", ()))
        if died is None:
            raise
        raise died from error
