"""Copy micro-batches to the GPU, the next one while the current one is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_anymal.data.micro_batch import MicroBatch


class HostToDevice(Protocol):
    """Copies micro-batches to the device that computes them."""

    def start(self, micro_batch: MicroBatch) -> Any:
        """Start a copy. Returns the argument for `finish`."""
        ...

    def finish(self, started: Any) -> MicroBatch:
        """Return the copy; work enqueued from here on sees it complete."""
        ...


class SideStream:
    """Copies on a side stream, overlapping the computation on the current stream.

    Memory is allocated from, and returned to, the current stream's pool, and a copy waits for the work enqueued on that
    stream so far. So a copy may reuse the memory of an earlier micro-batch only after that one is computed, however far
    the host runs ahead of the GPU, and no `record_stream` is needed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, torch.cuda.Stream(device)

    def start(self, micro_batch: MicroBatch) -> MicroBatch:
        """See HostToDevice. The host does not wait for the copy, provided that the source is pinned."""
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
    """On a CPU there is nothing to copy."""

    def start(self, micro_batch: MicroBatch) -> MicroBatch:
        """See HostToDevice."""
        return micro_batch

    def finish(self, started: MicroBatch) -> MicroBatch:
        """See HostToDevice."""
        return started


def on_device(
    micro_batches: Iterable[MicroBatch], device: torch.device, *, media: bool = True
) -> Generator[MicroBatch, None, None]:
    """Yield a step's micro-batches on the device, each copied while the previous one is computed.

    Args:
        media: whether this model chunk encodes media; if not, they are dropped instead of copied.
    """
    copies: HostToDevice = NoCopy() if device.type == "cpu" else SideStream(device)
    return one_ahead((m if media else dataclasses.replace(m, media={}) for m in micro_batches), copies)


def one_ahead(micro_batches: Iterable[MicroBatch], copies: HostToDevice) -> Generator[MicroBatch, None, None]:
    """Yield every micro-batch once, in order; when one is yielded, the copy of exactly the next one has started.

    No reference to the yielded one is kept, so at most two occupy device memory. If the generator is closed early, it
    waits for the pending copy before releasing it.
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
    """Return the micro-batch with its tensors on the device."""
    return micro_batch.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
