"""One training step, and one validation batch: the same forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_anymal.data.batches import BatchPlanner, StepPlan
from megatron_anymal.data.types import MicroBatch
from megatron_anymal.losses import batch_mean, sums_by_group
from megatron_anymal.model.attention import token_positions
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.optim import learning_rate, set_rates


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank."""

    # Mean over the batch's target tokens.
    loss: float
    # By modality of the sample (that of its first media item; "text" without media).
    loss_by_modality: dict[str, float]
    targets_by_modality: dict[str, int]
    # LLM tokens that are not padding, all replicas.
    tokens: int
    # Tokens computed, padding included.
    padded_tokens: int
    # sample name -> why it was skipped.
    bad: dict[str, str]
    dropped: int
    grad_norm: float = 0.0
    lr: float = 0.0


def train_step(state: TrainState, plan: StepPlan, micro_batches: Sequence[MicroBatch]) -> StepResult:
    """Forward, backward, reduce, update."""
    rate = learning_rate(state.config, state.step)
    set_rates(state.optimizer, rate, state.config.model.optim.weight_decay)
    for wrapped in state.wrapped:
        wrapped.zero_grad_buffer()
        wrapped.train()
    state.optimizer.zero_grad()
    result = _run(state, state.train_data.planner, plan, micro_batches, forward_only=False)
    _, grad_norm, _ = state.optimizer.step()
    state.step += 1
    return dataclasses.replace(result, grad_norm=float(grad_norm or 0.0), lr=rate)


@torch.no_grad()
def validation_step(state: TrainState, plan: StepPlan, micro_batches: Sequence[MicroBatch]) -> StepResult:
    """The loss of a validation batch."""
    assert state.validation_data is not None
    for wrapped in state.wrapped:
        wrapped.eval()
    return _run(state, state.validation_data.planner, plan, micro_batches, forward_only=True)


def _run(
    state: TrainState,
    planner: BatchPlanner,
    plan: StepPlan,
    micro_batches: Sequence[MicroBatch],
    *,
    forward_only: bool,
) -> StepResult:
    bad = _agree_on_bad(plan, micro_batches, state.layout.device)
    targets = np.where([place in bad for place in range(len(plan.targets))], 0, plan.targets)
    names = ["text", *state.modalities]
    groups = _groups(plan, names)
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, state, int(targets.sum()), groups, len(names), bad),
        # Each part of a virtual pipeline runs every micro-batch.
        data_iterator=[iter(micro_batches) for _ in state.wrapped] if len(state.wrapped) > 1 else iter(micro_batches),
        model=state.wrapped if len(state.wrapped) > 1 else state.wrapped[0],
        num_microbatches=len(micro_batches),
        seq_length=plan.padded_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=state.layout.device)
    if state.layout.counts_loss:
        sums += torch.stack(reports).sum(0)
    dist.all_reduce(sums)
    losses, counts = sums.cpu().tolist()
    assert int(sum(counts)) == int(targets.sum()), "targets counted and targets planned differ"
    reasons = _name_bad(planner, plan, bad)
    dropped = set(plan.dropped)
    return StepResult(
        loss=sum(losses) / max(1.0, sum(counts)),
        loss_by_modality={n: loss / count for n, loss, count in zip(names, losses, counts) if count},
        targets_by_modality={n: int(count) for n, count in zip(names, counts) if count},
        tokens=sum(int(n) for place, n in enumerate(plan.length) if place not in dropped),
        padded_tokens=plan.padded_length * sum(len(replica) for replica in plan.micro_batches),
        bad=reasons,
        dropped=len(plan.dropped),
    )


def _forward_step(
    state: TrainState,
    batch_targets: int,
    groups: Tensor,
    group_count: int,
    bad: Mapping[int, str],
    micro_batches: Iterator[MicroBatch],
    model: Any,
) -> tuple[Tensor, Any]:
    """What megatron-core's schedules call for each micro-batch."""
    micro_batch = to_device(next(micro_batches), state.layout.device)
    _name_tokens(state, micro_batch)
    mask = micro_batch.loss_mask
    for place in bad:
        mask = mask.masked_fill(micro_batch.sample_positions == place, 0.0)
    output = model(micro_batch, labels=micro_batch.labels)

    def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        owners = micro_batch.sample_positions
        token_groups = torch.where(owners >= 0, groups.to(owners.device)[owners.clamp(min=0)], -1)
        report = sums_by_group(losses, mask, token_groups, group_count)
        return batch_mean(losses, mask, batch_targets), torch.zeros((), dtype=torch.int, device=losses.device), report

    return output, loss_of


def _name_tokens(state: TrainState, micro_batch: MicroBatch) -> None:
    """What the adapters drop is chosen by token."""
    dropout = state.models[0].lora_dropout
    if dropout is not None:
        layout = state.layout
        positions = token_positions(micro_batch.document_lengths, layout.context_rank, layout.context_size)
        owners = micro_batch.sample_positions[0]
        dropout.set_tokens(state.config.model.seed, micro_batch.plan.step, owners, positions.to(owners.device))


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on the device."""
    if device.type == "cpu":
        return micro_batch
    media = {
        name: dataclasses.replace(
            m, pieces=m.pieces.to(device, non_blocking=True), token_index=m.token_index.to(device, non_blocking=True)
        )
        for name, m in micro_batch.media.items()
    }
    moved = {
        name: getattr(micro_batch, name).to(device, non_blocking=True)
        for name in ("tokens", "labels", "loss_mask", "sample_positions")
    }
    return dataclasses.replace(micro_batch, media=media, **moved)


def _groups(plan: StepPlan, names: Sequence[str]) -> Tensor:
    """[global batch]: under which name each sample's loss is reported."""
    return torch.tensor([names.index(media[0].modality) if media else 0 for media in plan.media])


def _agree_on_bad(plan: StepPlan, micro_batches: Sequence[MicroBatch], device: torch.device) -> dict[int, str]:
    """Places that any rank could not read, with the reason (empty where only another rank knows it). Collective."""
    mine = {place: why for m in micro_batches for place, why in m.bad.items()}
    flags = torch.zeros(len(plan.targets), dtype=torch.uint8, device=device)
    if mine:
        flags[list(mine)] = 1
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return {int(place): mine.get(int(place), "") for place in flags.cpu().nonzero().flatten()}


def _name_bad(planner: BatchPlanner, plan: StepPlan, bad: Mapping[int, str]) -> dict[str, str]:
    """Sample name -> reason, the same on every rank. Collective only where there is something bad."""
    if not bad:
        return {}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {place: why for place, why in bad.items() if why})
    reasons = {place: why for part in reversed(found) for place, why in part.items()}
    return {planner.key(int(plan.dataset[place]), int(plan.sample[place])): reasons[place] for place in sorted(bad)}
