"""The order in which megatron-core 0.16.1 runs a step on each pipeline stage: passes and messages.

One event stands for one pass or for one call of P2PCommunicator._communicate. A test records the events of
megatron-core's own schedules (megatron/core/pipeline_parallel/schedules.py) and compares them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


class Event(NamedTuple):
    """A pass, or an exchange of messages with the neighbouring stages."""

    # forward, backward or exchange.
    kind: str
    # Model chunk of a pass.
    chunk: int = 0
    # Micro-batch of a pass.
    micro_batch: int = 0
    # An exchange sends an activation to the next stage.
    send_next: bool = False
    # An exchange receives an activation from the previous stage.
    receive_previous: bool = False
    # An exchange sends a gradient to the previous stage.
    send_previous: bool = False
    # An exchange receives a gradient from the next stage.
    receive_next: bool = False
    # An exchange ends with its messages; else the pass that needs a message waits for it.
    waits: bool = True


def _exchange(
    next_: bool = False, previous: bool = False, gradient: bool = False, from_next: bool = False, waits: bool = True
) -> Iterator[Event]:
    """Yield an exchange, if it has any message."""
    if next_ or previous or gradient or from_next:
        yield Event("exchange", 0, 0, next_, previous, gradient, from_next, waits)


@cache
def events_of_stage(stage: int, stages: int, chunks: int, micro_batches: int, overlap: bool) -> tuple[Event, ...]:
    """Return the events of one stage in order.

    Args:
        chunks: model chunks per stage (virtual pipeline).
        micro_batches: per step; with several chunks a multiple of `stages`.
        overlap: `model.overlap_p2p_comm`; used with several chunks only.
    """
    if stages == 1:
        return tuple(Event(kind, 0, n) for n in range(micro_batches) for kind in ("forward", "backward"))
    if chunks == 1:
        return tuple(_one_forward_one_backward(stage, stages, micro_batches))
    return tuple(_Interleaved(stage, stages, chunks, micro_batches, overlap).events())


def _one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> Iterator[Event]:
    """forward_backward_pipelining_without_interleaving."""
    before, after = stage > 0, stage < stages - 1
    warm_up = min(stages - stage - 1, micro_batches)
    rest = micro_batches - warm_up
    for n in range(warm_up):
        yield from _exchange(previous=before)
        yield Event("forward", 0, n)
        yield from _exchange(next_=after)
    if rest:
        yield from _exchange(previous=before)
    for n in range(rest):
        yield Event("forward", 0, warm_up + n)
        yield from _exchange(next_=after, from_next=after)
        yield Event("backward", 0, n)
        yield from _exchange(gradient=before, previous=before and n < rest - 1)
    for n in range(rest, micro_batches):
        yield from _exchange(from_next=after)
        yield Event("backward", 0, n)
        yield from _exchange(gradient=before)


class _Interleaved:
    """forward_backward_pipelining_with_interleaving, with groups of as many micro-batches as stages."""

    def __init__(self, stage: int, stages: int, chunks: int, micro_batches: int, overlap: bool) -> None:
        self.first, self.last = stage == 0, stage == stages - 1
        self.stages, self.chunks, self.overlap = stages, chunks, overlap
        # The order of (micro-batch, chunk) on every stage: groups of micro-batches pass through the chunks in turn.
        self.order = [
            (n, chunk)
            for start in range(0, micro_batches, stages)
            for chunk in range(chunks)
            for n in range(start, min(start + stages, micro_batches))
        ]
        warm_up = (stages - stage - 1) * 2 + (chunks - 1) * stages
        self.warm_up = min(warm_up, len(self.order))
        self.rest = len(self.order) - self.warm_up

    def events(self) -> Iterator[Event]:
        """Yield the events in order."""
        yield from _exchange(previous=not self.first)
        for k in range(self.warm_up):
            yield from self._warm_up(k)
        for k in range(self.rest):
            yield from self._steady(k)
        if not self.rest:
            yield from _exchange(from_next=not self.last)
        for k in range(self.rest, len(self.order)):
            yield self._backward(k)
            receives = self._receives(k, forward=False) and k < len(self.order) - 1
            yield from _exchange(gradient=self._sends(k, forward=False), from_next=receives)

    def _warm_up(self, k: int) -> Iterator[Event]:
        yield self._forward(k)
        last = k == self.warm_up - 1 and self.rest > 0
        receives = self._receives(k, forward=True) and k < len(self.order) - 1
        gradient = last and not self.last
        sends = self._sends(k, forward=True)
        yield from _exchange(sends, receives, from_next=gradient and not self.overlap)
        if self.overlap:
            yield from _exchange(from_next=gradient, waits=False)

    def _steady(self, k: int) -> Iterator[Event]:
        ahead = k + self.warm_up
        receives = self._receives(ahead, forward=True) and k < self.rest - 1
        gradients = self._receives(k, forward=False)
        sends, sends_gradient = self._sends(ahead, forward=True), self._sends(k, forward=False)
        yield self._forward(ahead)
        if self.overlap:
            yield from _exchange(sends, receives, waits=False)
        yield self._backward(k)
        if self.overlap:
            yield from _exchange(gradient=sends_gradient, from_next=gradients, waits=False)
        else:
            yield from _exchange(sends, receives, sends_gradient, gradients)

    def _forward(self, k: int) -> Event:
        n, chunk = self.order[k]
        return Event("forward", chunk, n)

    def _backward(self, k: int) -> Event:
        n, chunk = self.order[k]
        return Event("backward", self.chunks - 1 - chunk, n)

    def _sends(self, k: int, forward: bool) -> bool:
        """Whether the k-th pass has a result for the next stage (a gradient for the previous one)."""
        # In both directions the chunk that comes last is the order's last one.
        return not ((self.last if forward else self.first) and self.order[k][1] == self.chunks - 1)

    def _receives(self, k: int, forward: bool) -> bool:
        """Whether a message for a later pass is received after the k-th one (recv_tensor_from_previous_stage)."""
        if not (self.first if forward else self.last):
            return True
        # The stage at the other end is stages - 1 passes behind, and the last chunk's result goes nowhere.
        behind = k - (self.stages - 1)
        return behind >= 0 and self.order[behind][1] != self.chunks - 1
