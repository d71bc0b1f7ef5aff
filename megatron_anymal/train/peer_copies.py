"""Copies of a run's trainable state in memory: what is copied, how often, and how a run continues from it."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Optional

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor

from megatron_anymal.checkpoint.optimizer_steps import set_updates, updates_of
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.peer_memory.rank_copies import RankCopies, copy_location
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.optim import begin_state, components

# Largest share of the training time that copies may take if their interval is automatic.
_SHARE = 0.01
# Steps over which cost and step time are measured; the first ones are not typical.
_MEASURED, _NOT_TYPICAL = 6, 2


class PeerCopies:
    """Keeps copies of a run's trainable state after every few steps, and continues from them.

    Does nothing unless the run was started by `anymal launch`, whose memory outlives the ranks.

    Args:
        manifest: of a checkpoint of this run; a copy of a run with another one, apart from its step, is not used.
        say: prints a message.
        record: records an event: kind, text, fields.
    """

    def __init__(
        self, state: TrainState, manifest: Manifest, say: Callable[[str], None], record: Callable[..., None]
    ) -> None:
        self._state, self._say, self._record = state, say, record
        # Steps between copies; 0 until it has been chosen.
        self._interval = state.config.resilience.peer_memory_interval
        # Seconds of each copy, and of the step before it; None once they are known.
        self._costs: Optional[list[tuple[float, float]]] = []
        self._copies: Optional[RankCopies] = None
        where = copy_location() if state.config.resilience.peer_memory else None
        if where is None:
            return
        if reason := _why_not(state):
            say(f"no copies of the trainable state in memory: {reason}; a restart continues from the newest checkpoint")
            return
        begin_state(state.optimizer)
        identity = _identity(manifest, state.layout.world_size)
        try:
            self._copies = RankCopies(where, identity, list(_tensors(state.optimizer)), _warn)
        except OSError as error:
            _warn(f"warning: rank {state.layout.rank}: no copies of the trainable state in memory ({error.strerror})")
        self._agree()

    def resume(self) -> bool:
        """Continue from the newest step that all ranks have kept, if it is newer than `state.step`. Collective."""
        if self._copies is None:
            return False
        state, step = self._state, self._copies.newest(self._state.step)
        while step > state.step:
            counts = self._copies.load(step, list(_tensors(state.optimizer)))
            if counts is not None:
                _apply(state, counts)
                state.step = step
                self._say(f"resumed from memory at step {step}")
                return True
            self._say(f"warning: the copies of step {step} in memory are damaged or gone")
            step = self._copies.newest(state.step, before=step)
        return False

    def settle(self) -> None:
        """Wait until the last copy is complete; called before the ranks agree on an update."""
        if self._copies is not None:
            self._copies.settle()

    def keep(self, seconds: float) -> None:
        """Copy the state after a step, if it is due.

        Args:
            seconds: time that the step took.
        """
        copies, state = self._copies, self._state
        if copies is None or (self._interval and state.step % self._interval):
            return
        copies.keep(state.step, list(_tensors(state.optimizer)), _counts(state.optimizer))
        if self._costs is not None:
            self._costs.append((copies.waited, seconds))
            self._choose()
        copies.waited = 0.0

    def close(self) -> None:
        """Stop the background work."""
        if self._copies is not None:
            self._copies.close()

    def _choose(self) -> None:
        """Once the costs are known: if it is open, choose the smallest interval that takes at most 1 % of the time.

        Collective.
        """
        assert self._copies is not None and self._costs is not None
        if len(self._costs) < _MEASURED:
            return
        costs, steps = zip(*self._costs[_NOT_TYPICAL:])
        self._costs = None
        cost = statistics.median(costs)
        slowest = torch.tensor([cost, cost / statistics.median(steps)], device=self._state.layout.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds, share = slowest.tolist()
        self._interval = self._interval or max(1, math.ceil(share / _SHARE))
        text = (
            f"copies of the trainable state in memory: {self._copies.size / 1e6:,.1f} MB on rank 0, every "
            f"{self._interval} step(s), {share / self._interval:.1%} of the time"
        )
        self._say(text)
        self._record("copies", text, interval=self._interval, seconds=seconds, bytes=self._copies.size)

    def _agree(self) -> None:
        """Give up on all ranks if one has no memory. Collective."""
        everyone = torch.tensor([int(self._copies is not None)], device=self._state.layout.device)
        dist.all_reduce(everyone, op=dist.ReduceOp.MIN)
        if not int(everyone):
            self._copies = None


def _warn(text: str) -> None:
    """Print a warning of this rank; the run's log is that of rank 0."""
    print(text, file=sys.stderr, flush=True)


def _why_not(state: TrainState) -> str:
    """Why a run's state cannot be copied; empty if it can."""
    fp8 = state.config.model.fp8
    if fp8 and state.config.model.fp8_recipe == "delayed":
        return "delayed FP8 scaling keeps state inside Transformer Engine's modules"
    return ""


def _identity(manifest: Manifest, processes: int) -> str:
    fields = {**asdict(manifest), "step": 0, "consumed_samples": 0, "metrics": {}, "processes": processes}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Everything that an update changes on this rank, apart from weights that follow from the main weights."""
    for component in components(optimizer):
        inner = component.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from (value for _, value in sorted(inner.state[parameter].items()) if torch.is_tensor(value))


def _counts(optimizer: MegatronOptimizer) -> list[int]:
    return [updates_of(group) for part in components(optimizer) for group in part.optimizer.param_groups]


@torch.no_grad()
def _apply(state: TrainState, counts: tuple[int, ...]) -> None:
    """Set the update counts, and the weights from the main weights as an update does. Collective."""
    groups = [group for part in components(state.optimizer) for group in part.optimizer.param_groups]
    for group, count in zip(groups, counts):
        set_updates(group, count)
    for part in components(state.optimizer):
        # The parameters of this one are the model's. All others must have the method: weights would stay as they were.
        if not isinstance(part, FP32Optimizer):
            part._copy_main_params_to_model_params()
    if state.config.model.ddp.use_distributed_optimizer:
        for wrapped in state.wrapped:
            wrapped.start_param_sync(force_sync=True)
