"""A rank's side: copy its trainable state to memory after a step, and find the newest step that all ranks have kept.

With a frozen base the trainable state is small: weights, main weights and moments of projectors and adapters. A rank
copies its part to memory that its launcher owns, and from there, in the background, to the launcher of the next node.
After a failure the run continues from the newest step for which a copy of every rank's part survives, which costs at
most the steps between two copies; checkpoints remain for everything else.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_anymal.peer_memory import wire
from megatron_anymal.peer_memory.server import MEMORY
from megatron_anymal.peer_memory.slots import Copy, SlotFile

# Tensors begin at multiples of this many bytes.
_ALIGNMENT = 64


@dataclass(frozen=True)
class CopyLocation:
    """Where a rank keeps its copies."""

    # File of this rank.
    file: str
    # Address of this node's server; empty on a single node.
    server: str
    # Address of the next node's server; empty on a single node.
    neighbour: str


def copy_location(environment: Mapping[str, str] = os.environ) -> Optional[CopyLocation]:
    """Where the launcher lets this rank keep its copies; None without a launcher."""
    if MEMORY not in environment:
        return None
    given = json.loads(environment[MEMORY])
    number = int(environment["LOCAL_RANK"])
    return CopyLocation(given["files"][number], given["server"], given["neighbour"])


class RankCopies:
    """Copies of a rank's tensors, kept outside its process.

    Args:
        location: where.
        identity: hash of everything that a run must have in common with the one that made a copy.
        tensors: the tensors to copy, in a fixed order, of any shapes [...].
        say: prints a warning.

    Raises:
        OSError: there is not enough memory, or the launcher is gone.
    """

    def __init__(
        self, location: CopyLocation, identity: str, tensors: Sequence[Tensor], say: Callable[[str], None]
    ) -> None:
        self._location, self._identity, self._say = location, identity, say
        self.rank = dist.get_rank()
        # Offsets in bytes, and the end.
        self._offsets = [0]
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            self._offsets.append(self._offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        # Bytes of a copy.
        self.size = max(_ALIGNMENT, self._offsets[-1])
        # The same on all ranks: in the next attempt, the file may be that of another rank, and must keep its contents.
        largest = torch.tensor([self.size], device=torch.device("cuda"))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self._file = SlotFile(location.file, int(largest))
        self._targets: dict[int, list[Tensor]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="anymal-copies")
        self._pending: Optional[Future[None]] = None
        # Seconds for which training has waited for copies.
        self.waited = 0.0
        self._connection: Any = None
        self._neighbour = bool(location.neighbour)
        # All copies of this run, each with the address of the node that holds it; the same on all ranks.
        self._everything: list[tuple[Copy, str]] = []

    def keep(self, step: int, tensors: Sequence[Tensor], counts: Sequence[int]) -> None:
        """Copy the tensors to this node's memory; checksum and transfer follow in the background.

        The copy counts from the return on, even if this process is killed before its checksum is known.

        Args:
            step: updates made so far.
            tensors: those of the constructor, of the same shapes [...].
            counts: update counts of the optimizer's parameter groups.
        """
        self.settle()
        begun = time.monotonic()
        slot = self._file.begin()
        # Blocking, so that the next step cannot change what is copied.
        for target, tensor in zip(self._views(slot, tensors), tensors):
            target.copy_(tensor.detach())
        copy = Copy(self.rank, step, self._identity, self.size, None, tuple(counts))
        self._file.commit(slot, copy)
        self._pending = self._worker.submit(self._finish, slot, copy)
        self.waited += time.monotonic() - begun

    def settle(self) -> None:
        """Wait until the last copy is complete, here and on the neighbour.

        Called before the ranks agree on an update: then no rank can complete a step whose predecessor another rank has
        not kept.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            begun = time.monotonic()
            pending.result()
            self.waited += time.monotonic() - begun

    def close(self) -> None:
        """Stop the background work."""
        with suppress(Exception):
            self.settle()
        self._worker.shutdown()
        if self._connection is not None:
            self._connection.close()

    def newest(self, after: int, before: float = math.inf) -> int:
        """Newest step between `after` and `before` that all ranks have kept; -1 if there is none. Collective."""
        self._gather()
        steps: dict[int, set[int]] = {rank: set() for rank in range(dist.get_world_size())}
        for copy, _ in self._everything:
            steps[copy.rank].add(copy.step)
        return max((step for step in set.intersection(*steps.values()) if after < step < before), default=-1)

    def load(self, step: int, tensors: Sequence[Tensor]) -> Optional[tuple[int, ...]]:
        """Read this rank's copy of a step into the tensors. Collective.

        Args:
            step: as found by `newest`.
            tensors: those of the constructor, of the same shapes [...].

        Returns:
            Update counts of the optimizer's parameter groups; None, with the tensors unchanged, if a copy of any rank
            is damaged or gone.
        """
        copy, data = self._read(step)
        # MIN: all or none.
        good = torch.tensor([int(copy is not None)], device=torch.device("cuda"))
        dist.all_reduce(good, op=dist.ReduceOp.MIN)
        if not int(good):
            return None
        assert copy is not None and data is not None
        for source, tensor in zip(self._sliced(data, tensors), tensors):
            tensor.data.copy_(source)
        return copy.counts

    def _gather(self) -> None:
        """Tell each other about the copies of this run."""
        copies = [(copy, self._location.server) for copy in self._file.copies().values()]
        if self._location.server and os.environ.get("LOCAL_RANK") == "0":
            try:
                copies += [(copy, self._location.server) for copy in wire.list_copies(self._location.server)]
            except OSError as error:
                self._say(f"warning: the memory of this node cannot be read ({error}).")
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, [pair for pair in copies if pair[0].identity == self._identity])
        self._everything = [pair for pairs in gathered for pair in pairs]

    def _read(self, step: int) -> tuple[Optional[Copy], Optional[memoryview]]:
        for slot, copy in self._file.copies().items():
            if (copy.rank, copy.step, copy.identity) == (self.rank, step, self._identity):
                # Copied, because the slot may be overwritten while the tensors still refer to it.
                data = memoryview(bytearray(self._file.data(slot)[: copy.size]))
                if self._is_good(copy, data):
                    return copy, data
        for copy, address in self._everything:
            if address and copy.rank == self.rank and copy.step == step:
                with suppress(OSError):
                    data = memoryview(wire.fetch(address, copy))
                    if self._is_good(copy, data):
                        return copy, data
        return None, None

    def _is_good(self, copy: Copy, data: memoryview) -> bool:
        return copy.size == self.size and copy.checksum in (None, zlib.crc32(data))

    def _finish(self, slot: int, copy: Copy) -> None:
        data = self._file.data(slot)[: self.size]
        copy = replace(copy, checksum=zlib.crc32(data))
        self._file.commit(slot, copy)
        if self._neighbour:
            self._send(copy, data)

    def _send(self, copy: Copy, data: memoryview) -> None:
        try:
            if self._connection is None:
                self._connection = wire.connect(self._location.neighbour)
            wire.put(self._connection, self._location.neighbour, copy, data)
        except OSError as error:
            # If the node is lost, the attempt ends anyway; if only the connection is, checkpoints remain.
            self._neighbour = False
            where = wire.visible(self._location.neighbour)
            self._say(
                f"warning: rank {self.rank}: no more copies on the next node ({where}: {error}). If this node is lost, "
                "the run continues from its newest checkpoint."
            )

    def _views(self, slot: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        if slot not in self._targets:
            self._targets[slot] = self._sliced(self._file.data(slot), tensors)
        return self._targets[slot]

    def _sliced(self, data: memoryview, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the shapes and types of `tensors` in a buffer."""
        whole = torch.frombuffer(data, dtype=torch.uint8)
        return [
            whole[begin : begin + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            for begin, tensor in zip(self._offsets, tensors)
        ]
