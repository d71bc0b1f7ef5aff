"""Share the encoding of a step's media among the pipeline stages (model.encoder_placement=all_stages).

Stage p waits for p forward passes before its first one, and for p backward passes after its last one, while the stages
before it are busy. It can encode the coming step's media meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_anymal.data.records import PlannedMicroBatch


@dataclass(frozen=True)
class StageShares:
    """How stages share the encoding. The same on every rank."""

    # Number of pipeline stages.
    stages: int
    # Encoder cost of one piece by modality, in any unit. What costs nothing stays on the first stage.
    costs: Mapping[str, float]
    # What a stage could encode, in the same unit, in the time that a stage's forward and backward pass of a micro-batch
    # take; 0: no stage has time to spare, and all get the same share.
    slot: float

    def assign(self, micro_batches: Sequence[PlannedMicroBatch]) -> tuple[PlannedMicroBatch, ...]:
        """Choose the stage that encodes each modality of each micro-batch of a replica.

        A micro-batch's media of a modality stay together, so that encoders see the same calls as on the first stage.
        The costliest come first, each to the stage that then works longest beyond its waiting time for the least;
        as long as all fit into the waiting times, to the one that fills the smallest share of its own.

        Returns:
            The micro-batches with `encoded_on`.
        """
        work = sorted(
            (-cost * pieces, number, name)
            for number, micro_batch in enumerate(micro_batches)
            for name, cost in self.costs.items()
            if (pieces := _pieces(micro_batch, name)) and cost > 0
        )
        loads = [0.0] * self.stages
        chosen: list[dict[str, int]] = [{} for _ in micro_batches]
        for negative, number, name in work:
            cost = -negative
            stage = min(range(self.stages), key=lambda stage: self._burden(stage, loads[stage] + cost))
            loads[stage] += cost
            if stage:
                chosen[number][name] = stage
        return tuple(
            dataclasses.replace(micro_batch, encoded_on=tuple(sorted(stages.items())))
            for micro_batch, stages in zip(micro_batches, chosen)
        )

    def _burden(self, stage: int, load: float) -> tuple[float, float, int]:
        """What to keep low: work beyond the waiting time, then the share of that time; ties go to later stages."""
        wait = stage * self.slot
        return max(0.0, load - wait), load / wait if wait else 0.0, -stage


def _pieces(micro_batch: PlannedMicroBatch, name: str) -> int:
    return sum(item.pieces for sample in micro_batch.samples for item in sample.media if item.modality == name)
