"""Rates of floating-point operations, and the share of the GPUs' peak that they are (model/operations counts).

Every rank knows the plan of the whole batch, so the operations of a step need no communication and no look at the
device. Only seconds and cached features differ between ranks: they are summed once per log line, together with
`pass_times`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from megatron_anymal.config import ModelConfig
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.model.memory.run_sizes import chunks_of_stages
from megatron_anymal.model.memory.sizes import Recompute
from megatron_anymal.model.operations.costs import ModelCosts, llama_costs, media_costs
from megatron_anymal.model.operations.step import Documents, Operations, StepAmounts, step_operations
from megatron_anymal.train.build import TrainState

# Names of the metrics; the last four only with a known peak.
UTILIZATION_METRICS = (
    "tflops_per_gpu",
    "hardware_tflops_per_gpu",
    "encoder_seconds",
    "encoder_tflops",
    "llama_tflops",
    "mfu",
    "hfu",
    "encoder_utilization",
    "llama_utilization",
)


@dataclass(frozen=True)
class Peak:
    """The rate of one GPU that utilization is a share of.

    Attributes:
        layers: operations per second in the number format of the Llama's layers.
        encoders: the same in that of the encoders, which do not run in FP8.
        source: where the rates are from, for the log.
    """

    layers: float
    encoders: float
    source: str


class Utilization:
    """Counts the operations of the steps since the last log line.

    Args:
        state: the run, with its model built.
        peak: of one GPU; None if unknown: then rates are reported, but no shares.

    Raises:
        ConfigError: the layers do not divide.
    """

    def __init__(self, state: TrainState, peak: Optional[Peak]):
        self._state, self._peak = state, peak
        # Only ranks with encoders report or read cached features: those of the first stage, or of all stages.
        self._costs = model_costs(state) if state.layout.is_first_stage or state.stage_encoding else None
        self._trainable = trainable_media(state.config.model)
        self._total = Operations()
        # What this rank left out because features were cached.
        self._saved = Operations()

    def describe(self) -> str:
        """Return the line of the log that names the peak."""
        if self._peak is None:
            return "no MFU: the peak rate is unknown. Set trainer.gpu to a GPU of `anymal plan`, or to a measured file."
        return f"MFU relative to a peak of {self._peak.layers / 1e12:,.4g} TFLOP/s per GPU ({self._peak.source})"

    def add(self, plan: StepPlan, micro_batches: Sequence[MicroBatch], *, reference: bool) -> None:
        """Count a step.

        Args:
            micro_batches: those of this rank.
            reference: whether the step computed log-probabilities of the reference (DPO).
        """
        if self._costs is None:
            return
        self._total = self._total.plus(
            step_operations(self._costs, step_amounts(plan, self._trainable, reference=reference))
        )
        for micro_batch in micro_batches:
            for name, media in micro_batch.media.items():
                if media.features is not None:
                    encoding = len(media.features.index) * self._costs.media[name].encoder.forward
                    again = encoding if reference else 0.0
                    self._saved = self._saved.plus(Operations(encoding=encoding, encoding_again=again))

    def own_sums(self) -> list[float]:
        """Return this rank's numbers that `metrics` needs summed over all ranks, and begin a new interval."""
        saved, self._saved = self._saved, Operations()
        return [saved.encoding, saved.encoding_again, *self._state.pass_times.take_encoding()]

    def metrics(self, steps: int, measured: Mapping[str, Any], sums: Sequence[float]) -> dict[str, float]:
        """Return UTILIZATION_METRICS of the steps since the last call, on ranks that have encoders.

        Args:
            steps: their number.
            measured: their `step_seconds`, `forward_seconds` and `backward_seconds`.
            sums: `own_sums`, summed over all ranks.
        """
        total, self._total = self._total, Operations()
        if self._costs is None:
            return {}
        encoding, again, in_passes, ahead = sums
        encoder_seconds = in_passes + ahead
        total = total.plus(Operations(encoding=encoding, encoding_again=again), -1.0)
        ranks = self._state.layout.world_size
        whole = ranks * steps * measured["step_seconds"]
        passes = ranks * steps * (measured["forward_seconds"] + measured["backward_seconds"])
        rates = {
            "tflops_per_gpu": _rate(total.needed, whole),
            "hardware_tflops_per_gpu": _rate(total.computed, whole),
            "encoder_tflops": _rate(total.encoding + total.encoding_again, encoder_seconds),
            "llama_tflops": _rate(total.needed - total.encoding, passes - in_passes),
        }
        values = {**rates, "encoder_seconds": encoder_seconds / (ranks * steps)}
        if self._peak is not None:
            layers, encoders = self._peak.layers / 1e12, self._peak.encoders / 1e12
            values["mfu"] = rates["tflops_per_gpu"] / layers
            values["hfu"] = rates["hardware_tflops_per_gpu"] / layers
            values["encoder_utilization"] = rates["encoder_tflops"] / encoders
            values["llama_utilization"] = rates["llama_tflops"] / layers
        return values


def _rate(operations: float, seconds: float) -> float:
    """1e12 operations per second."""
    return 1e-12 * operations / seconds if seconds > 0 else 0.0


def model_costs(state: TrainState) -> ModelCosts:
    """Return the costs of a run's model, on a rank that has its encoders.

    Raises:
        ConfigError: the layers do not divide.
    """
    model, hf = state.config.model, state.llama
    encoders: Any = state.stage_encoding.encoders if state.stage_encoding else state.models[0].encoders
    media = {
        name: media_costs(
            section.projector,
            encoders[name].feature_tokens,
            encoders[name].width,
            encoders[name].flops_per_piece(),
            hf.hidden_size,
            encoder_trains=not section.encoder.freeze,
        )
        for name, section in model.modalities.items()
    }
    chunks = [chunk.layers for stage in chunks_of_stages(model, hf) for chunk in stage]
    reached, other = (
        llama_costs(model, hf, reached=reached, recompute=_recompute(state), chunks=chunks) for reached in (True, False)
    )
    return ModelCosts(reached, other, media)


def _recompute(state: TrainState) -> Recompute:
    """Return the recomputation that is in use; the configuration may have left it to the run."""
    used: Any = state.models[0].config
    return Recompute(
        used.recompute_granularity or "",
        tuple(used.recompute_modules or ()) if used.recompute_granularity == "selective" else (),
        used.recompute_method or "block",
        used.recompute_num_layers or 1,
    )


def trainable_media(model: ModelConfig) -> frozenset[str]:
    """Return the names of the media whose documents have something trainable before the Llama's layers."""
    names = {
        name for name, section in model.modalities.items() if not (section.encoder.freeze and section.projector.freeze)
    }
    return frozenset(names | (set(model.discrete) if model.discrete_rows != "none" else set()))


def step_amounts(plan: StepPlan, trainable: frozenset[str], *, reference: bool) -> StepAmounts:
    """Return what a planned step computes on, over all replicas. Samples that cannot be read count as planned: they are
    computed, and left out of the loss.

    Args:
        trainable: names of the media before whose documents' tokens something trains.
        reference: whether the documents also go through the reference.
    """
    media, number = plan.media, len(plan.targets)
    kept = np.ones(number, bool)
    kept[list(plan.dropped)] = False
    owner = np.repeat(np.arange(number), np.diff(media.start))
    trains = np.array([name in trainable for name in media.names], bool)
    reached = np.zeros(number, bool)
    reached[owner[trains[media.modality]]] = True
    pieces = np.bincount(media.modality, media.pieces * kept[owner], len(media.names))
    # The square of a shared prompt is part of both documents' squares, but it is computed once.
    squares = (plan.documents**2).sum(axis=1) - plan.shared**2

    def of(chosen: np.ndarray) -> Documents:
        columns = (plan.length, squares, plan.targets)
        return Documents(*(float(column[chosen].sum()) for column in columns))

    return StepAmounts(
        reached=of(kept & reached),
        other=of(kept & ~reached),
        pieces={name: float(count) for name, count in zip(media.names, pieces) if count},
        reference=reference,
    )
