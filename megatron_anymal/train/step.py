"""One training step and one validation batch, which share the same forward pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.planner import BatchPlanner
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.model.lora import as_reference
from megatron_anymal.parallel import sum_over_ranks
from megatron_anymal.resilience import fault_injection, heartbeat, nonfinite, stop_signals
from megatron_anymal.resilience.heartbeat import Phase
from megatron_anymal.train.alignment_updates import set_alignment_rates, squared_norms, update_alignments
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.device_prefetch import on_device
from megatron_anymal.train.objective import GlobalBatch, PreferenceObjective
from megatron_anymal.train.optim import learning_rate, set_rates


@dataclass(frozen=True)
class StepResult:
    """Result of a step; identical on every rank."""

    # Mean over the batch's target tokens (or samples, or pairs).
    loss: float
    # Mean loss per modality of the sample: that of its first media item; "text" without media.
    loss_by_modality: dict[str, float]
    # Number of targets, samples or pairs that each of these means is over.
    counts_by_modality: dict[str, float]
    # With discrete media: mean loss by kind of target token, "text" or a kind of media.
    loss_by_kind: dict[str, float]
    # Number of these targets.
    targets_by_kind: dict[str, float]
    # The objective's additional metrics, as means.
    measures: dict[str, float]
    # LLM tokens over all replicas, without padding.
    tokens: int
    # LLM tokens computed, including padding.
    padded_tokens: int
    # Sample name -> why it was skipped.
    bad: dict[str, str]
    # Global L2 norm of the gradient before clipping; inf if it was not finite. 0 in validation and with alignments.
    grad_norm: float = 0.0
    # Learning rate of the update. 0 in validation and with alignments.
    lr: float = 0.0
    # model.multiplex: norm of the gradient of each alignment that takes part in the step.
    grad_norms: dict[str, float] = field(default_factory=dict)
    # model.multiplex: learning rate of each.
    rates: dict[str, float] = field(default_factory=dict)
    # Nothing was updated, or not the weights of `skipped_alignments`: a gradient or loss was not finite on some rank.
    skipped: bool = False
    # model.multiplex: names of the alignments whose weights were not updated.
    skipped_alignments: tuple[str, ...] = ()
    # Why a rank asks to stop after this step; empty if none does.
    stop: str = ""
    # DPO: the step ran the reference, whose log-probabilities the run's folder did not have.
    reference_computed: bool = False


@dataclass(frozen=True)
class Reduced:
    """Result of a pass, summed over all processes."""

    # The objective's report.
    report: list[float]
    # Whether gradients and losses are finite on every rank, by alignment; the only key is "" without model.multiplex.
    finite: dict[str, bool]
    # Why a rank asks to stop; empty if none does.
    stop: str


def train_step(
    state: TrainState,
    plan: StepPlan,
    micro_batches: Sequence[MicroBatch],
    coming: Optional[Sequence[MicroBatch]] = None,
) -> StepResult:
    """Forward, backward, reduce, update; no rank updates if a gradient is not finite on any rank.

    Args:
        coming: the next step's micro-batches, if pipeline stages encode ahead (model.encoder_placement).
    """
    number = state.step + 1
    heartbeat.beat(Phase.COMPUTE, number)
    with state.own_time.counted():
        fault_injection.inject("compute", number)
    if state.stage_encoding is not None:
        state.stage_encoding.prepare(micro_batches)
    bad, batch = _begin(state, state.train_data.planner, plan, micro_batches)
    rates = _set_rates(state)
    for wrapped in state.wrapped:
        wrapped.zero_grad_buffer()
    _set_mode(state, training=True)
    state.optimizer.zero_grad()
    if state.stage_encoding is not None and coming is not None:
        state.stage_encoding.begin(coming)
    reduced = _pass(state, plan, micro_batches, bad, batch, forward_only=False)
    if state.stage_encoding is not None and coming is not None:
        state.stage_encoding.deliver(micro_batches)
    heartbeat.beat(Phase.UPDATE)
    fault_injection.inject("update", number)
    chosen = [name for name in rates if reduced.finite[name]]
    norms = dict.fromkeys(rates, math.inf)
    if chosen:
        update = state.pass_times("update")
        update.start()
        norms |= _update(state, chosen)
        update.stop()
    # A skipped update still counts as a step: its samples are not seen again.
    state.step += 1
    heartbeat.beat(settled=True)
    result = _result(state, state.train_data.planner, plan, bad, batch, reduced)
    left = tuple(name for name in rates if name not in chosen)
    if not state.config.model.multiplex:
        return dataclasses.replace(result, grad_norm=norms[""], lr=rates[""], skipped=bool(left))
    return dataclasses.replace(result, grad_norms=norms, rates=rates, skipped=bool(left), skipped_alignments=left)


def _set_rates(state: TrainState) -> dict[str, float]:
    """Set and return the rate of each alignment that takes part; the only key is "" without model.multiplex."""
    model, last = state.config.model, state.config.trainer.max_steps
    if model.multiplex:
        return set_alignment_rates(state.optimizer, model.multiplex, last, state.step)
    rate = learning_rate(model.optim, last, state.step)
    set_rates(state.optimizer, rate, model.optim.weight_decay)
    return {"": rate}


def _update(state: TrainState, chosen: Sequence[str]) -> dict[str, float]:
    """Update the weights of some alignments, and return the norm of each gradient before clipping. Collective."""
    if state.config.model.multiplex:
        return update_alignments(state.optimizer, state.config.model.multiplex, chosen)
    _, grad_norm, _ = state.optimizer.step()
    return {"": float(grad_norm or 0.0)}


@torch.no_grad()
def validation_step(state: TrainState, plan: StepPlan, micro_batches: Sequence[MicroBatch]) -> StepResult:
    """Compute the loss of a validation batch."""
    assert state.validation_data is not None
    planner = state.validation_data.planner
    if state.stage_encoding is not None:
        state.stage_encoding.prepare(micro_batches)
    bad, batch = _begin(state, planner, plan, micro_batches)
    _set_mode(state, training=False)
    reduced = _pass(state, plan, micro_batches, bad, batch, forward_only=True)
    return _result(state, planner, plan, bad, batch, reduced)


def _set_mode(state: TrainState, *, training: bool) -> None:
    for wrapped in state.wrapped:
        # Visits every module, which takes longer than some steps' collectives.
        if wrapped.training != training:
            wrapped.train(training)


def stop_asked_for(state: TrainState) -> str:
    """Return why to stop before the first step: a signal that any rank received; "" if none. Collective.

    The time limit is ignored here: every start takes at least one step, so a run with too short a limit still finishes
    eventually.
    """
    count = len(stop_signals.SIGNALS)
    sums = torch.tensor(stop_signals.stop_flags()[:count], dtype=torch.float64, device=state.layout.device)
    sum_over_ranks(sums)
    return stop_signals.agreed(sums.cpu().tolist())


def _begin(
    state: TrainState, planner: BatchPlanner, plan: StepPlan, micro_batches: Sequence[MicroBatch]
) -> tuple[dict[int, str], GlobalBatch]:
    """Gather what the passes need: unreadable samples, counts and reference log-probabilities. Collective."""
    bad = _agree_on_bad(plan, micro_batches, state.layout.device)
    names = ["text", *state.modalities, *state.config.model.discrete]
    batch = GlobalBatch.of(plan, bad, names, state.layout.device, list(state.config.model.multiplex))
    if state.reference is not None:
        data = f"{planner.fingerprint()[:8]}{planner.content()[:8]}"
        keys = [
            f"{data}/{planner.key(int(d), int(s))}" if count else None
            for d, s, count in zip(plan.dataset, plan.sample, batch.counts)
        ]
        computed: list[Tensor] = []

        def ask() -> Tensor:
            computed.append(_reference_pass(state, plan, micro_batches, bad, batch))
            return computed[0]

        reference = state.reference.log_probabilities(keys, ask)
        return bad, dataclasses.replace(batch, reference=reference, reference_computed=bool(computed))
    return bad, batch


@torch.no_grad()
def _reference_pass(
    state: TrainState,
    plan: StepPlan,
    micro_batches: Sequence[MicroBatch],
    bad: Mapping[int, str],
    batch: GlobalBatch,
) -> Tensor:
    """Return the reference log-probabilities of both answers, [global batch, 2] float64, on every rank. Collective."""
    state.wait_for_param_gather()
    _set_mode(state, training=False)
    log_probabilities = torch.zeros(len(plan.targets), 2, dtype=torch.float64, device=state.layout.device)

    def collect(losses: Tensor, mask: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        positions, (logs, _) = PreferenceObjective.answers(losses, mask, micro_batch, batch)
        if state.layout.counts_loss and state.layout.context_rank == 0:
            log_probabilities[positions] = logs
        return losses.sum(), torch.zeros(1, dtype=torch.float64, device=losses.device)

    with as_reference(state.models):
        _run_schedule(state, plan, micro_batches, bad, collect, forward_only=True)
    sum_over_ranks(log_probabilities)
    return log_probabilities


def _pass(
    state: TrainState,
    plan: StepPlan,
    micro_batches: Sequence[MicroBatch],
    bad: Mapping[int, str],
    batch: GlobalBatch,
    *,
    forward_only: bool,
) -> Reduced:
    """Run every micro-batch. Collective."""
    objective = state.objective

    def loss_of(losses: Tensor, mask: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return objective.loss(losses, mask, micro_batch, batch)

    reports = _run_schedule(state, plan, micro_batches, bad, loss_of, forward_only=forward_only)
    size, multiplex = 2 * len(batch.names) + len(objective.extras), state.config.model.multiplex
    end = size + max(1, len(multiplex))
    # Squared gradient norms and the stop requests follow the report, so that one all-reduce carries everything.
    sums = torch.zeros(end + len(stop_signals.REASONS), dtype=torch.float64, device=state.layout.device)
    if state.layout.counts_loss:
        sums[:size] = torch.stack(reports).sum(0)
    if not forward_only:
        if fault_injection.spoils_gradient(state.step + 1):
            _spoil_gradient(state)
        if multiplex:
            sums[size:end] = squared_norms(state.models, multiplex, state.layout.device)
        else:
            sums[size] = nonfinite.squared_norm(state.wrapped, state.layout.device)
        state.before_update()
    sums[end:] = torch.tensor(stop_signals.stop_flags(), dtype=torch.float64)
    sum_over_ranks(sums)
    totals = sums.cpu().tolist()
    report = totals[:size]
    finite = {
        name: nonfinite.all_finite([report[batch.names.index(name)]], squared)
        for name, squared in zip(multiplex, totals[size:end])
    } or {"": nonfinite.all_finite(report, totals[size])}
    return Reduced(report, finite, stop_signals.agreed(totals[end:]))


def _spoil_gradient(state: TrainState) -> None:
    """Fill this rank's gradients with NaN (fault injection)."""
    for wrapped in state.wrapped:
        for buffer in wrapped.buffers:
            buffer.grad_data.fill_(math.nan)


def _run_schedule(
    state: TrainState,
    plan: StepPlan,
    micro_batches: Sequence[MicroBatch],
    bad: Mapping[int, str],
    loss_of: Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, Tensor]],
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Run megatron-core's schedule over the micro-batches; returns the reports on the last stage."""
    several = len(state.wrapped) > 1
    with ExitStack() as stack:
        # Every virtual pipeline chunk runs every micro-batch; only the first one needs the media.
        batches = [
            stack.enter_context(closing(on_device(micro_batches, state.layout.device, media=model.pre_process)))
            for model in state.models
        ]
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, state, bad, loss_of),
            data_iterator=batches if several else batches[0],
            model=state.wrapped if several else state.wrapped[0],
            num_microbatches=len(micro_batches),
            seq_length=plan.padded_length,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _forward_step(
    state: TrainState,
    bad: Mapping[int, str],
    loss_of: Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, Tensor]],
    micro_batches: Iterator[MicroBatch],
    model: Any,
) -> tuple[Tensor, Any]:
    """Forward step that megatron-core's schedules call for each micro-batch."""
    heartbeat.beat()
    micro_batch = next(micro_batches)
    mask = micro_batch.loss_mask
    for position in bad:
        mask = mask.masked_fill(micro_batch.sample_positions == position, 0.0)
    with state.own_time.counted():
        output = model(micro_batch, labels=micro_batch.labels)

    def counted(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, report = loss_of(losses, mask, micro_batch)
        return loss, torch.zeros((), dtype=torch.int, device=losses.device), report

    return output, counted


def _result(
    state: TrainState,
    planner: BatchPlanner,
    plan: StepPlan,
    bad: Mapping[int, str],
    batch: GlobalBatch,
    reduced: Reduced,
) -> StepResult:
    names, report = batch.names, reduced.report
    losses, counts = report[: len(names)], report[len(names) : 2 * len(names)]
    extras, kinds = report[2 * len(names) :], state.objective.kinds
    of_kinds = list(zip(kinds, extras, extras[len(kinds) :]))
    total = state.objective.count(batch)
    assert round(sum(counts)) == total, f"counted {sum(counts)}, planned {total}"
    return StepResult(
        loss=sum(losses) / max(1, total),
        loss_by_modality={n: loss / count for n, loss, count in zip(names, losses, counts) if count},
        counts_by_modality={n: count for n, count in zip(names, counts) if count},
        loss_by_kind={kind: loss / count for kind, loss, count in of_kinds if count},
        targets_by_kind={kind: count for kind, _, count in of_kinds if count},
        measures=state.objective.measures(extras),
        tokens=plan.tokens,
        padded_tokens=plan.padded_length * sum(len(replica) for replica in plan.micro_batches),
        bad=_name_bad(planner, plan, bad),
        stop=reduced.stop,
        reference_computed=batch.reference_computed,
    )


def _agree_on_bad(plan: StepPlan, micro_batches: Sequence[MicroBatch], device: torch.device) -> dict[int, str]:
    """Return the batch positions that any rank could not read, with the reason ("" if only another rank knows it).

    Collective.
    """
    mine = {position: why for m in micro_batches for position, why in m.bad.items()}
    if dist.get_world_size() == 1:
        return mine
    flags = torch.zeros(len(plan.targets), dtype=torch.uint8, device=device)
    if mine:
        flags[list(mine)] = 1
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return {position: mine.get(position, "") for position, flag in enumerate(flags.tolist()) if flag}


def _name_bad(planner: BatchPlanner, plan: StepPlan, bad: Mapping[int, str]) -> dict[str, str]:
    """Map sample names to reasons, the same on every rank. Collective only if there are bad samples."""
    if not bad:
        return {}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {position: why for position, why in bad.items() if why})
    reasons = {position: why for rank_reasons in reversed(gathered) for position, why in rank_reasons.items()}
    return {
        planner.key(int(plan.dataset[position]), int(plan.sample[position])): reasons[position]
        for position in sorted(bad)
    }
