"""Micro-batches on their way to the card: the next one is copied while one is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_anymal.data.records import MicroBatch


class HostToDevice(Protocol):
    """Carries micro-batches to where they are computed."""

    def start(self, micro_batch: MicroBatch) -> Any:
        """Begin to copy. Returns what `finish` takes."""
        ...

    def finish(self, started: Any) -> MicroBatch:
        """What was copied; whatever is computed from here on sees it whole."""
        ...


class SideStream:
    """Copies on a stream of its own, beside the computation on the current one.

    Memory is taken from, and goes back to, the current stream's pool, and the copy waits for what that stream was given
    so far. So a copy lands in the memory of an earlier micro-batch once that one is computed, however far the host is
    ahead of the card, and nothing has to be recorded for the allocator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, torch.cuda.Stream(device)

    def start(self, micro_batch: MicroBatch) -> MicroBatch:
        """See HostToDevice. Only from pinned memory does the host not wait for the copy."""
        copies: list[tuple[Tensor, Tensor]] = []

        def place(source: Tensor) -> Tensor:
            copies.append((torch.empty_like(source, device=self._device), source))
            return copies[-1][0]

        copy = micro_batch.with_tensors(place)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
        return copy

    def finish(self, started: MicroBatch) -> MicroBatch:
        """See HostToDevice."""
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        return started


class NoCopy:
    """On a CPU they are there already."""

    def start(self, micro_batch: MicroBatch) -> MicroBatch:
        """See HostToDevice."""
        return micro_batch

    def finish(self, started: MicroBatch) -> MicroBatch:
        """See HostToDevice."""
        return started


def on_device(
    micro_batches: Iterable[MicroBatch], device: torch.device, *, media: bool = True
) -> Generator[MicroBatch, None, None]:
    """A step's micro-batches on the device, each copied while the one before it is computed.

    Args:
        media: whether this model part encodes them; without, they stay where they are.
    """
    copies: HostToDevice = NoCopy() if device.type == "cpu" else SideStream(device)
    return one_ahead((m if media else dataclasses.replace(m, media={}) for m in micro_batches), copies)


def one_ahead(micro_batches: Iterable[MicroBatch], copies: HostToDevice) -> Generator[MicroBatch, None, None]:
    """Every micro-batch once, in its order; when one is handed out, the next one's copy has begun, and no other's.

    The one handed out is not held here: of two at a time the memory is taken. Ended early (`close`), what is under way
    is waited for before it is let go.
    """
    waiting: list[Any] = []
    try:
        for micro_batch in micro_batches:
            ready = [copies.finish(waiting.pop())] if waiting else []
            waiting.append(copies.start(micro_batch))
            if ready:
                yield ready.pop()
        if waiting:
            yield copies.finish(waiting.pop())
    finally:
        if waiting:
            copies.finish(waiting.pop())


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on the device."""
    return micro_batch.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
