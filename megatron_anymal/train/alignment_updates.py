"""Several alignments in one optimizer (`model.multiplex`): each with its own rate, clipping and number of updates.

megatron-core's optimizer holds the parameters of all of them. The groups of each are told apart by the key "alignment",
its number in `model.multiplex`, and count its updates under "updates". Their "step", from which Adam's bias correction
follows, is that number, too, except in checkpoints, where megatron-core wants the same one for all groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_anymal.checkpoint.optimizer_steps import set_updates
from megatron_anymal.config import AlignmentConfig
from megatron_anymal.train.optim import begin_state, components, learning_rate, set_group_rate


def begin_alignments(optimizer: MegatronOptimizer, alignments: Mapping[str, AlignmentConfig]) -> None:
    """Give each alignment's groups its own settings and, even if its first updates are skipped, a state."""
    begin_state(optimizer)
    sections = list(alignments.values())
    for group in optimizer.param_groups:
        optim = sections[group["alignment"]].optim
        group.update(betas=tuple(optim.betas), eps=optim.eps, updates=0)


def running(alignments: Mapping[str, AlignmentConfig], step: int) -> list[str]:
    """Names of the alignments that take part in a step, which counts from 0."""
    return [name for name, one in alignments.items() if not one.max_steps or step < one.max_steps]


def set_alignment_rates(
    optimizer: MegatronOptimizer, alignments: Mapping[str, AlignmentConfig], max_steps: int, step: int
) -> dict[str, float]:
    """Set the learning rate and weight decay of a step, which counts from 0.

    Args:
        max_steps: `trainer.max_steps`.

    Returns:
        The rate of each running alignment.
    """
    names = list(alignments)
    rates = {
        name: learning_rate(alignments[name].optim, alignments[name].max_steps or max_steps, step)
        for name in running(alignments, step)
    }
    for group in optimizer.param_groups:
        name = names[group["alignment"]]
        if name in rates:
            set_group_rate(group, rates[name], alignments[name].optim.weight_decay)
    return rates


@torch.no_grad()
def update_alignments(
    optimizer: MegatronOptimizer, alignments: Mapping[str, AlignmentConfig], chosen: Collection[str]
) -> dict[str, float]:
    """Clip the gradients of some alignments, each by the norm of its own, and update their weights. Collective.

    Args:
        chosen: their names, the same on every rank.

    Returns:
        The norm of each before clipping.
    """
    optimizer.prepare_grads()
    numbers = {number: name for number, name in enumerate(alignments) if name in chosen}
    norms = {}
    for number, name in numbers.items():
        with _only(optimizer, {number}):
            norms[name] = float(optimizer.get_grad_norm())
            limit, parameters = alignments[name].gradient_clip_val, _parameters(optimizer)
            if limit > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, limit, norms[name])
    with _only(optimizer, numbers):
        optimizer.step_with_ready_grads()
        for group in optimizer.param_groups:
            # Some optimizers do not count the updates of groups without parameters on this rank.
            set_updates(group, group["updates"] + 1)
    return norms


@contextmanager
def _only(optimizer: MegatronOptimizer, numbers: Collection[int]) -> Iterator[None]:
    """Let an optimizer see the parameter groups of some alignments only."""
    inner: list[Any] = [part.optimizer for part in components(optimizer)]
    kept = [one.param_groups for one in inner]
    for one, groups in zip(inner, kept):
        one.param_groups = [group for group in groups if group["alignment"] in numbers]
    try:
        yield
    finally:
        for one, groups in zip(inner, kept):
            one.param_groups = groups


def _parameters(optimizer: MegatronOptimizer) -> list[Tensor]:
    return [parameter for part in components(optimizer) for parameter in part.get_parameters()]


def squared_norms(models: Collection[Any], alignments: Collection[str], device: torch.device) -> Tensor:
    """Squared norm of the gradient of each alignment on this rank, [alignments] float64; non-finite if any value is.

    As `nonfinite.squared_norm`, for the check only.

    Args:
        models: this rank's model chunks.
    """
    totals = torch.zeros(len(alignments), dtype=torch.float64, device=device)
    for number, name in enumerate(alignments):
        gradients = [
            parameter.main_grad
            for model in models
            for part in (model.encoders, model.projectors)
            if name in part
            for parameter in part[name].parameters()
            if parameter.requires_grad
        ]
        for norm in torch._foreach_norm(gradients) if gradients else ():
            totals[number] += norm.double() ** 2
    return totals
