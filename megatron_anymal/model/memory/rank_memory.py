"""A rank's memory use from sizes alone, without building a model or querying a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_anymal.model.memory.activations import kept_by_head, kept_by_layers, working
from megatron_anymal.model.memory.sizes import PipelineChunk, Recompute, RunSizes


def peak(stage: int, stages: int, micro_batches: int, parts: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Peak activation memory of a rank under megatron-core's 1F1B schedules.

    Args:
        parts: bytes that each of its model chunks holds per micro-batch.

    Returns:
        The peak, and the number of micro-batches in flight per chunk at that point.
    """
    if len(parts) == 1:
        number = min(micro_batches, stages - stage)
        return number * parts[0], (number,)
    if micro_batches % stages == 0:
        # The order repeats after each group of micro-batches, and the warm-up ends within two groups.
        micro_batches = min(micro_batches, 4 * stages)
    groups = range(0, micro_batches, stages)
    order = [
        chunk for first in groups for chunk in range(len(parts)) for _ in range(min(stages, micro_batches - first))
    ]
    warm_up = min(len(order), 2 * (stages - stage - 1) + (len(parts) - 1) * stages)
    alive, highest = [0] * len(parts), (0, (0,) * len(parts))
    for number, chunk in enumerate(order):
        alive[chunk] += 1
        held = sum(count * size for count, size in zip(alive, parts))
        highest = max(highest, (held, tuple(alive)))
        if number >= warm_up:
            alive[len(parts) - 1 - order[number - warm_up]] -= 1
    return highest


@dataclass(frozen=True)
class Held:
    """Memory use of one rank, in bytes."""

    # Weights, including a reference's adapters and copies for products in FP8 or NVFP4.
    weights: int
    # fp32 gradients.
    gradients: int
    # This rank's share of the optimizer state.
    optimizer: int
    # Activations saved for backward passes, at their peak.
    activations: int
    # Temporary tensors, and features of a step that were encoded during the one before.
    working: int
    # Micro-batches whose activations each model chunk holds.
    in_flight: tuple[int, ...]

    @property
    def total(self) -> int:
        """Sum of all categories."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def kept_by_chunk(run: RunSizes, chunk: PipelineChunk, recompute: Recompute) -> int:
    """Bytes that a model chunk holds per micro-batch from its forward to its backward pass."""
    llama, pack = run.llama, run.pack
    kept = kept_by_layers(llama, pack, chunk.layers, recompute) + chunk.first * run.media.kept
    # A chunk's output is held until its backward pass.
    return kept + (kept_by_head(llama, pack) if chunk.last else llama.number * llama.own(pack.tokens) * llama.hidden)


def _features(run: RunSizes, stage: int) -> int:
    """Bytes of the features that a stage holds if all stages encode: on the first one those of a step, on the others
    their share of them."""
    stages = len(run.stages)
    if not any(chunk.helps for chunks in run.stages for chunk in chunks):
        return 0
    of_step = run.micro_batches * run.media.features
    return -(-of_step * stage // sum(range(stages))) if stage else of_step


def held(run: RunSizes, stage: int, recompute: Recompute) -> Held:
    """Compute the memory use of a rank of a pipeline stage."""
    llama, pack, chunks = run.llama, run.pack, run.stages[stage]
    counts = [run.parameters(chunk) for chunk in chunks]
    frozen, trainable = sum(count.frozen for count in counts), sum(count.trainable for count in counts)
    copies = sum(count.adapters for count in counts) if run.reference else 0
    matrices = sum(count.matrices for count in counts)
    kept = [kept_by_chunk(run, chunk, recompute) for chunk in chunks]
    activations, in_flight = peak(stage, len(run.stages), run.micro_batches, kept)
    in_use = [
        max(
            working(llama, pack, chunk.layers, recompute, chunk.last),
            chunk.first * run.media.working,
            chunk.helps * run.media.encoding,
        )
        for chunk in chunks
    ]
    return Held(
        weights=llama.number * (frozen + trainable + copies) + int((llama.matrix_number - llama.number) * matrices),
        gradients=4 * trainable,
        optimizer=-(-run.optimizer_bytes * trainable // run.sharers),
        activations=activations,
        working=max(in_use) + _features(run, stage),
        in_flight=in_flight,
    )
