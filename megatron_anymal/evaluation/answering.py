"""Answering the samples of a task: shared among copies of the model, in batches of similar lengths, resumable."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Optional

from megatron_anymal.data.records import DataError
from megatron_anymal.evaluation.journal import AnswerJournal, AnswerRow
from megatron_anymal.evaluation.samples import TaskSample, build_prompt
from megatron_anymal.generation.generator import Generator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.modalities import MediaError
from megatron_anymal.parallel import gather_objects
from megatron_anymal.telemetry import Progress


@dataclass(frozen=True)
class Asking:
    """How samples are asked."""

    # Name of the task, for messages.
    task: str
    # Settings of the answers.
    sampling: Sampling
    # Prompts, or candidates, computed together.
    batch_size: int
    # Whether to compute the likelihood of the samples' candidates.
    likelihood: bool


def answer_samples(
    load: Callable[[], Generator], samples: Sequence[TaskSample], asking: Asking, journal: AnswerJournal
) -> dict[str, AnswerRow]:
    """Answer the samples that the journal lacks, and return all answers by key. Collective over the job.

    Args:
        load: returns the model; called only if there is something to answer or several processes take part.

    Raises:
        DataError: a sample cannot be answered; the message names it.
    """
    get = cache(load)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Creates the job that `gather_objects` needs.
        get()
    wanted = {sample.key for sample in samples}
    answers = _joined(gather_objects(journal.read()), wanted)
    missing = [sample for sample in samples if sample.key not in answers]
    if missing:
        try:
            new = _answer_share(get(), missing, asking, journal, len(answers))
        finally:
            journal.close()
        answers |= _joined(gather_objects(new), wanted)
    return answers


def batches_of(samples: Sequence[TaskSample], batch_size: int, replica: int, replicas: int) -> list[list[TaskSample]]:
    """A copy's batches of samples of similar lengths, the longest first: a lack of memory shows at once."""
    by_length = sorted(samples, key=lambda sample: -sample.size)
    # Not so large that copies stay idle.
    size = max(1, min(batch_size, -(-len(samples) // replicas)))
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return batches[replica::replicas]


def _answer_share(
    generator: Generator, samples: Sequence[TaskSample], asking: Asking, journal: AnswerJournal, before: int
) -> dict[str, AnswerRow]:
    """Answer this copy's share; only the process that leads the copy returns and records the answers."""
    batches = batches_of(samples, asking.batch_size, generator.replica, generator.replicas)
    progress = None
    if generator.reports:
        earlier = f"{before} answered before, " if before else ""
        copies = f", on {generator.replicas} copies of the model" if generator.replicas > 1 else ""
        print(f"{asking.task}: {earlier}{len(samples)} to answer{copies}", file=sys.stderr, flush=True)
        progress = Progress(asking.task, sum(map(len, batches)))
    answers: dict[str, AnswerRow] = {}
    for batch, prompts in _announced(generator, batches, asking):
        rows = _answer_batch(generator, batch, prompts, asking)
        if generator.leads_replica:
            journal.append(generator.replica, rows)
            answers |= {row.key: row for row in rows}
        if progress:
            progress.advance(len(batch))
    if progress:
        progress.finish()
    return answers


def _announced(
    generator: Generator, batches: Sequence[Sequence[TaskSample]], asking: Asking
) -> Iterator[tuple[Sequence[TaskSample], list[Prompt]]]:
    """Batches with their prompts; the media of the next one are being read while one is answered."""
    ready: Optional[list[Prompt]] = None
    for batch, following in zip_longest(batches, batches[1:], fillvalue=()):
        with _named(batch, asking):
            prompts = ready if ready is not None else [build_prompt(sample) for sample in batch]
        try:
            ready = [build_prompt(sample) for sample in following]
        except (DataError, MediaError):
            # Raised in its turn: the answers to this batch must not be lost.
            ready = None
        generator.read_ahead([prompts, ready or []])
        yield batch, prompts


@contextmanager
def _named(batch: Sequence[TaskSample], asking: Asking) -> Iterator[None]:
    """Name the samples in errors."""
    try:
        yield
    except (DataError, MediaError) as error:
        raise DataError(f"{asking.task}: samples {batch[0].key!r} to {batch[-1].key!r}: {error}") from error


def _answer_batch(
    generator: Generator, batch: Sequence[TaskSample], prompts: Sequence[Prompt], asking: Asking
) -> list[AnswerRow]:
    with _named(batch, asking):
        replies = generator.answer_batch(prompts, [sample.number for sample in batch], asking.sampling)
        likelihoods: dict[int, tuple[float, ...]] = {}
        rejected = {position: generator.rejections.get(sample.number) for position, sample in enumerate(batch)}
        scored = [
            position
            for position, s in enumerate(batch)
            if asking.likelihood and s.candidates and not rejected[position]
        ]
        if scored:
            candidates = [batch[position].candidates for position in scored]
            sums = generator.log_likelihoods([prompts[position] for position in scored], candidates, asking.batch_size)
            likelihoods = {position: tuple(values) for position, values in zip(scored, sums)}
    return [
        AnswerRow(
            sample.key,
            reply.text.strip(),
            likelihoods.get(position, ()),
            rejection.code if (rejection := rejected[position]) else "",
        )
        for position, (sample, reply) in enumerate(zip(batch, replies))
    ]


def _joined(parts: Sequence[Mapping[str, AnswerRow]], wanted: set[str]) -> dict[str, AnswerRow]:
    """Answers of all processes in the order of the ranks; those of samples that are not asked for are left out."""
    answers: dict[str, AnswerRow] = {}
    for part in parts:
        for key, row in part.items():
            if key in wanted:
                answers.setdefault(key, row)
    return answers
