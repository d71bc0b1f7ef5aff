"""Packs and samples as the loader reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_anymal.cli.data_page.numbers import RunView
from megatron_anymal.data.loader import MicroBatchReader, RankNeeds
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import DataError, MediaPart, PlannedMedia, PlannedSample
from megatron_anymal.data.shared_prompts import spans_of

_POSITIONS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class ShownMedia:
    """A media item of a shown sample."""

    # Its modality and number of pieces.
    planned: PlannedMedia
    # Its part of the sample; None if the sample's text cannot be read.
    part: MediaPart | None
    # The two numbers of `Modality.probe`, from the index.
    size: tuple[float, float]
    # Bytes of the file.
    file_bytes: int
    # [pieces, *piece_shape]: the encoder's input, as the loader returned it.
    pieces: np.ndarray


@dataclass(frozen=True)
class ShownSample:
    """A sample with its contents."""

    # Its entry in the plan.
    planned: PlannedSample
    # DATASET/KEY.
    name: str
    # Positions of its documents in the pack.
    documents: list[slice]
    # Its media items, in order, without codes.
    media: list[ShownMedia]
    # Why the loader could not read it; empty if it could.
    bad: str


@dataclass(frozen=True)
class ShownPack:
    """A micro-batch with the samples that are shown."""

    # Step, counted from 0.
    step: int
    # Replica that runs it.
    replica: int
    # Its number among the replica's micro-batches of the step, from 0.
    number: int
    # Its contents.
    micro_batch: MicroBatch
    # Samples that are shown, in the order of the pack.
    samples: list[ShownSample]


def choose(view: RunView, step: int, count: int) -> list[tuple[int, int]]:
    """Step and position of the first `count` samples of a step, in the order in which its packs run."""
    rounds = view.planner.plan(step).in_order()
    in_order = [sample.position for packs in rounds for pack in packs for sample in pack.samples]
    return [(step, position) for position in in_order[:count]]


def occurrence(view: RunView, dataset: int, sample: int) -> tuple[int, int]:
    """Step and position at which a run uses a sample first.

    Raises:
        DataError: it ends before that, or leaves the sample out.
    """
    planner, name = view.planner, view.planner.key(dataset, sample)
    end = view.max_steps * planner.global_batch_size
    for start in range(0, end, _POSITIONS_AT_ONCE):
        datasets, samples = planner.samples(start, min(start + _POSITIONS_AT_ONCE, end))
        matches = np.flatnonzero((datasets == dataset) & (samples == sample))
        if len(matches):
            step, position = divmod(start + int(matches[0]), planner.global_batch_size)
            if position in planner.plan(step).dropped:
                raise DataError(f"--sample: {name!r} is longer than data.seq_length={planner.layout.seq_length}.")
            return step, position
    raise DataError(f"--sample: the run ends at trainer.max_steps={view.max_steps}, before it uses {name!r}.")


def read_packs(view: RunView, chosen: Collection[tuple[int, int]]) -> Iterator[ShownPack]:
    """Read the packs of some samples, given by step and position, in the order in which they run."""
    # As a rank without tensor, pipeline and context parallelism has it: it reads everything.
    reader = MicroBatchReader(view.planner, view.tokenizer, view.loaded, RankNeeds(text=True, media=True), view.codes)
    for step in sorted({step for step, _ in chosen}):
        plan, wanted = view.planner.plan(step), {position for at, position in chosen if at == step}
        for number in range(len(plan.micro_batches[0])):
            for replica in range(len(plan.micro_batches)):
                if wanted.intersection(plan.micro_batches[replica][number]):
                    micro_batch = reader[plan.of_replica(replica)[number]]
                    yield ShownPack(step, replica, number, micro_batch, _samples(view, micro_batch, wanted))


def _samples(view: RunView, micro_batch: MicroBatch, wanted: Collection[int]) -> list[ShownSample]:
    shown = []
    # Pieces of a modality that belong to the samples before.
    before: dict[str, int] = {}
    for planned in micro_batch.plan.samples:
        media = []
        parts = _media_parts(view, planned)
        rows = view.planner.indexes[planned.dataset].media_rows(planned.sample)
        for item, part, row in zip(planned.media, parts, rows):
            if item.modality not in view.loaded:
                # Codes are shown among the tokens.
                continue
            start = before.get(item.modality, 0)
            before[item.modality] = start + item.pieces
            pieces = micro_batch.media[item.modality].pieces[start : start + item.pieces].numpy()
            width, height = map(float, row["size"])
            media.append(ShownMedia(item, part, (width, height), int(row["length"]), pieces))
        if planned.position in wanted:
            name = view.planner.key(planned.dataset, planned.sample)
            bad = micro_batch.bad.get(planned.position, "").removeprefix(f"{name}: ")
            shown.append(ShownSample(planned, name, _spans(micro_batch, planned), media, bad))
    return shown


def _media_parts(view: RunView, planned: PlannedSample) -> list[MediaPart | None]:
    """The media parts of a sample; None for each if it cannot be read, which the loader has reported."""
    try:
        return [*view.planner.indexes[planned.dataset].sample(planned.sample).media]
    except DataError:
        return [None] * len(planned.media)


def _spans(micro_batch: MicroBatch, planned: PlannedSample) -> list[slice]:
    """Positions of a sample's documents in its pack, or of its prompt and answers."""
    return spans_of(micro_batch.plan)[micro_batch.plan.samples.index(planned)]
