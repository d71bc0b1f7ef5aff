"""Stages of a run's mixture (`data.schedule`): the weights of each, and the order of samples over all of them.

A stage is a `GlobalOrder` of its own that begins where the one before ends. Each dataset continues with the sample
after the last one that earlier stages took, so that no sample repeats before its dataset is used up. Which samples a
step uses depends on the stages up to that step, not on later ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from megatron_anymal.config import DatasetConfig, StageConfig
from megatron_anymal.config.schedule_validation import SMALLEST_SHARE
from megatron_anymal.data.global_order import GlobalOrder, permute
from megatron_anymal.data.records import DataError
from megatron_anymal.data.sample_measures import Measures

# Samples of a dataset whose lengths are read for shares by token; of a larger one, a random choice.
_MEASURED = 1 << 20


@dataclass(frozen=True)
class MixStage:
    """A part of a run with one mixture."""

    # Name for logs; empty if the run has no schedule.
    name: str
    # Position of its first sample in the run's order.
    start: int
    # Weight of each dataset by samples; 0 leaves it out.
    weights: tuple[float, ...]


def stage_lines(
    datasets: Mapping[str, DatasetConfig],
    schedule: Sequence[StageConfig],
    max_steps: int,
    planned: Sequence[MixStage] = (),
) -> list[str]:
    """Each stage of a schedule in words: its steps, counted from 1, and its mixture.

    Args:
        datasets: `data.train`.
        schedule: `data.schedule`.
        max_steps: `trainer.max_steps`.
        planned: the stages with the weights by samples, if they are known.
    """
    lines, first = [], 1
    for number, stage in enumerate(schedule):
        last = first + stage.steps - 1 if stage.steps else max_steps
        mix = f"{_percent(stage.weights_of(datasets))} of the {stage.by}s"
        if planned and stage.by == "token":
            mix += f" ({_percent(dict(zip(datasets, planned[number].weights)))} of the samples)"
        name = f", {stage.name}" if stage.name else ""
        lines.append(f"stage {number + 1} of {len(schedule)}{name}: steps {first:,} to {last:,}, {mix}")
        first = last + 1
    return lines


def _percent(weights: Mapping[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {weight / total:.2%}" for name, weight in weights.items() if weight)


def mean_shares(stages: Sequence[MixStage], samples: int) -> list[float]:
    """Expected share of each dataset in the samples of a whole run.

    Args:
        samples: samples of the run.
    """
    ends = [*(stage.start for stage in stages[1:]), samples]
    lengths = np.array([end - stage.start for stage, end in zip(stages, ends)]) / samples
    weights = np.array([stage.weights for stage in stages])
    return (lengths @ (weights / weights.sum(axis=1, keepdims=True))).tolist()


class StagedOrder:
    """The sample at each position of a run with stages.

    Args:
        sizes: number of samples of each dataset.
        stages: in order; the first starts at position 0, and the last does not end.
        seed: of all permutations.
    """

    def __init__(self, sizes: Sequence[int], stages: Sequence[MixStage], seed: int):
        self._starts = [stage.start for stage in stages]
        self._orders: list[GlobalOrder] = []
        taken = np.zeros(len(sizes), np.int64)
        for number, stage in enumerate(stages):
            order = GlobalOrder(tuple(sizes), stage.weights, seed, tuple(taken.tolist()), number)
            self._orders.append(order)
            if number + 1 < len(stages):
                taken = taken + order.counts(stages[number + 1].start - stage.start)

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples at positions [start, stop).

        Returns:
            Dataset [stop - start] and sample within the dataset [stop - start], both int64.
        """
        first, last = self.stage_at(start), self.stage_at(max(start, stop - 1))
        bounds = [start, *self._starts[first + 1 : last + 1], stop]
        parts = [
            order.samples(low - begin, high - begin)
            for (low, high), begin, order in zip(pairwise(bounds), self._starts[first:], self._orders[first:])
        ]
        return np.concatenate([dataset for dataset, _ in parts]), np.concatenate([sample for _, sample in parts])

    def stage_at(self, position: int) -> int:
        """Number of the stage that a position belongs to, from 0."""
        return bisect_right(self._starts, position) - 1


def plan_stages(
    datasets: Mapping[str, DatasetConfig],
    schedule: Sequence[StageConfig],
    global_batch_size: int,
    mean_tokens: Callable[[int], float],
) -> tuple[MixStage, ...]:
    """The stages of a run; without a schedule, one with the datasets' own weights.

    Args:
        datasets: `data.train`.
        schedule: `data.schedule`.
        mean_tokens: tokens of a mean sample of a dataset, by its number.

    Raises:
        DataError: a dataset of a stage by tokens has no tokens, or too small a share of the samples.
    """
    if not schedule:
        return (MixStage("", 0, tuple(dataset.weight for dataset in datasets.values())),)
    names, tokens_of = list(datasets), cache(mean_tokens)
    stages, start = [], 0
    for number, stage in enumerate(schedule):
        weights = list(stage.weights_of(datasets).values())
        if stage.by == "token":
            weights = _by_sample(weights, tokens_of, names, f"data.schedule[{number}]")
        stages.append(MixStage(stage.name or str(number + 1), start, tuple(weights)))
        start += stage.steps * global_batch_size
    return tuple(stages)


def _by_sample(weights: list[float], mean_tokens: Callable[[int], float], names: list[str], where: str) -> list[float]:
    """Weights by samples for shares of tokens: a sample counts as much as a mean sample of its dataset is long."""
    by_sample = [0.0] * len(weights)
    for number, weight in enumerate(weights):
        if weight:
            tokens = mean_tokens(number)
            if not tokens:
                raise DataError(
                    f"{where}.by=token: no sample of data.train.{names[number]} is within data.seq_length. Raise it."
                )
            by_sample[number] = weight / tokens
    for name, weight in zip(names, by_sample):
        if 0 < weight < SMALLEST_SHARE * sum(by_sample):
            raise DataError(
                f"{where}.weights: data.train.{name} would be less than {SMALLEST_SHARE} of the samples, because its "
                "samples are so long. Raise its weight, or set it to 0."
            )
    return by_sample


def mean_tokens(measure: Callable[[np.ndarray], Measures], samples: int, seq_length: int) -> float:
    """LLM tokens of a mean sample of a dataset, soft tokens and codes included.

    All samples are measured, or a random choice of about a million. Samples longer than `seq_length`, which training
    leaves out, count with 0 tokens.

    Args:
        measure: lengths of the samples with the given row numbers.
        samples: number of samples of the dataset.
    """
    rows = np.arange(samples) if samples <= _MEASURED else np.sort(permute(np.arange(_MEASURED), samples, 0))
    measures = measure(rows)
    return float(measures.documents[measures.length <= seq_length].sum()) / len(rows)
