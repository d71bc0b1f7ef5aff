"""Numbers of the page: lengths and costs from the indexes, and sums over planned samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_anymal.config import DatasetConfig, StageConfig
from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.data.configured_modality import LoadedModality
from megatron_anymal.data.planner import BatchPlanner
from megatron_anymal.data.records import PlannedSample
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.data.tokenizer import Tokenizer

# Steps that shares and fill are measured over.
MEASURED_STEPS = 20
_ROWS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class RunView:
    """A run's training data, and how it plans and reads them."""

    # Name of the configuration.
    name: str
    # Plans the steps.
    planner: BatchPlanner
    # The run's tokenizer.
    tokenizer: Tokenizer
    # What loading needs of each modality, by its name in the configuration.
    loaded: Mapping[str, LoadedModality]
    # Token ids of codes; None without discrete media.
    codes: CodeLayout | None
    # `data.train`.
    datasets: Mapping[str, DatasetConfig]
    # `data.schedule`.
    schedule: Sequence[StageConfig]
    # `trainer.max_steps`.
    max_steps: int


@dataclass(frozen=True)
class DatasetNumbers:
    """Lengths and costs of all samples of a dataset."""

    # Name in the configuration.
    name: str
    # Its index.
    index: ShardIndex
    # [n] LLM tokens, soft tokens included.
    lengths: np.ndarray
    # [n] encoder cost, in the planner's units.
    costs: np.ndarray


@dataclass
class Tally:
    """Sums over samples."""

    # Samples.
    samples: int = 0
    # LLM tokens.
    tokens: int = 0
    # Target tokens.
    targets: int = 0
    # Soft tokens.
    soft: int = 0
    # Encoder inputs: tiles, clips or windows.
    pieces: int = 0
    # Encoder cost, in the planner's units.
    cost: float = 0.0


def row_chunks(index: ShardIndex) -> list[np.ndarray]:
    """Row numbers of an index, [at most a million] int64 each."""
    return [np.arange(at, min(at + _ROWS_AT_ONCE, len(index))) for at in range(0, len(index), _ROWS_AT_ONCE)]


def dataset_numbers(view: RunView) -> list[DatasetNumbers]:
    """Measure all samples of all datasets."""
    numbers = []
    for name, index in zip(view.datasets, view.planner.indexes):
        measures = [view.planner.measure(index, rows) for rows in row_chunks(index)]
        lengths = np.concatenate([m.length for m in measures])
        costs = np.concatenate([m.costs for m in measures])
        numbers.append(DatasetNumbers(name, index, lengths, costs))
    return numbers


def fill(plan: StepPlan) -> float:
    """Share of a step's computed tokens that are real."""
    packs = sum(len(replica) for replica in plan.micro_batches)
    return plan.tokens / (plan.padded_length * packs)


def tally(view: RunView, samples: Sequence[PlannedSample]) -> Tally:
    """Sum up samples."""
    cost = view.planner.encoder_costs
    sums = Tally(samples=len(samples))
    for sample in samples:
        sums.tokens += sample.length
        sums.targets += sample.targets
        for item in sample.media:
            if item.modality not in view.loaded:
                # Codes are tokens of the Llama's vocabulary.
                continue
            sums.pieces += item.pieces
            # Each document of a sample contains all its media, which are encoded once; a shared prompt has them once.
            soft = item.pieces * view.loaded[item.modality].soft_tokens_per_piece
            sums.soft += soft * (1 if sample.shared else len(sample.documents))
            sums.cost += item.pieces * cost[item.modality]
    return sums


def planned_samples(plan: StepPlan) -> list[PlannedSample]:
    """The samples of a step that are in its packs."""
    return [s for replica in range(len(plan.micro_batches)) for m in plan.of_replica(replica) for s in m.samples]
