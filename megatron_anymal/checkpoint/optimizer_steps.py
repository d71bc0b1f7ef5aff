"""Numbers of updates of an optimizer's parameter groups, if they differ (`model.multiplex`).

megatron-core stores one step for all groups. Groups that are updated in different steps count under "updates" instead,
from which their "step" follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def updates_of(group: dict[str, Any]) -> int:
    """Return how often a parameter group was updated."""
    return int(group.get("updates", group.get("step", 0)))


def set_updates(group: dict[str, Any], count: int) -> None:
    """Set how often a parameter group was updated."""
    if "updates" in group:
        group["updates"] = count
    _set_step(group, count)


def _set_step(group: dict[str, Any], step: int) -> None:
    if torch.is_tensor(group.get("step")):
        group["step"].fill_(step)
    else:
        group["step"] = step


@contextmanager
def one_step(optimizer: Any) -> Iterator[None]:
    """Give all groups that count their updates the same step, as megatron-core's state dicts want it.

    Args:
        optimizer: a MegatronOptimizer.
    """
    groups = _counting(optimizer)
    latest = max((group["updates"] for group in groups), default=0)
    for group in groups:
        _set_step(group, latest)
    try:
        yield
    finally:
        restore_steps(optimizer)


def restore_steps(optimizer: Any) -> None:
    """Give every group that counts its updates its own step, after it was stored or loaded.

    Args:
        optimizer: a MegatronOptimizer.
    """
    for group in _counting(optimizer):
        _set_step(group, group["updates"])


def _counting(optimizer: Any) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if "updates" in group]
