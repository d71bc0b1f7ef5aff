"""Checks between the nodes before a run: a store for reports, and an all-reduce over all processes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    import torch

_POLL = 0.05
_ROUNDS = 3


class Unreachable(RuntimeError):
    """The first process does not answer."""


class Reports:
    """Reports of all processes, hosted by the first one.

    A process polls and never waits inside the store, so that one which does not report cannot hold up the others.

    Raises:
        Unreachable: the first process did not answer in time.
    """

    def __init__(self, address: str, port: int, rank: int, seconds: float) -> None:
        import torch.distributed as dist

        self.address, self.rank = address, rank
        try:
            self._store = dist.TCPStore(
                address, port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=max(seconds, 1))
            )
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "")[:200]
            raise Unreachable(f"{address}:{port} does not answer within {seconds:.0f} s ({reason})") from error
        self.port = self._store.port

    def say(self, what: str, value: Any) -> None:
        """Post a report of this process."""
        self._store.set(f"{what}/{self.rank}", json.dumps(value))

    def heard(self, what: str, ranks: Iterable[int], deadline: float) -> dict[int, Any]:
        """Reports by rank; without those that did not arrive before `deadline` (time.monotonic(), in seconds)."""
        reports: dict[int, Any] = {}
        waiting = list(ranks)
        while waiting:
            late = time.monotonic() >= deadline
            for rank in [rank for rank in waiting if self._store.check([f"{what}/{rank}"])]:
                reports[rank] = json.loads(self._store.get(f"{what}/{rank}"))
                waiting.remove(rank)
            if late:
                break
            if waiting:
                time.sleep(_POLL)
        return reports


@dataclass
class Traffic:
    """Result of an all-reduce over all processes.

    Attributes:
        problem: empty if every process got the correct sums.
        bytes: size of the tensor.
        seconds: time of the fastest round.
        offsets: offset of every rank's clock from this one's, in seconds; accurate to about the time of a barrier.
    """

    problem: str = ""
    bytes: int = 0
    seconds: float = 0.0
    offsets: tuple[float, ...] = ()

    def bandwidth(self, world: int) -> float:
        """Bus bandwidth in bytes per second, as defined by nccl-tests: 2 (n - 1) / n times the size, over the time."""
        return 2 * (world - 1) / world * self.bytes / self.seconds if self.seconds else 0.0


def all_reduce(reports: Reports, world: int, local_rank: int, seconds: float) -> Traffic:
    """All-reduce over all processes with the backend the run will use. Collective; takes at most `seconds`."""
    results: list[Traffic] = []

    def work() -> None:
        try:
            results.append(_all_reduce(reports, world, local_rank, seconds))
        except Exception as error:  # NCCL and gloo raise many types.
            results.append(Traffic(problem=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))

    worker = threading.Thread(target=work, name="preflight all-reduce", daemon=True)
    worker.start()
    worker.join(seconds)
    return results[0] if results else Traffic(problem=f"the all-reduce did not finish within {seconds:.0f} s")


def _all_reduce(reports: Reports, world: int, local_rank: int, seconds: float) -> Traffic:
    import torch
    import torch.distributed as dist

    from megatron_anymal import backend

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # A separate connection, since this thread does wait inside the store.
    store = dist.TCPStore(
        reports.address, reports.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds)
    )
    dist.init_process_group(
        backend.collectives_backend(),
        store=dist.PrefixStore("all-reduce", store),
        rank=reports.rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )
    try:
        return _measure(world, device)
    finally:
        dist.destroy_process_group()


def _measure(world: int, device: torch.device) -> Traffic:
    import torch
    import torch.distributed as dist

    # 64 MiB on GPUs, 4 MiB on CPUs. Integers that fp32 sums exactly, different in every position and on every rank.
    numbers = (torch.arange(2**24 if device.type == "cuda" else 2**20, device=device) % 1024).float()
    expected = world * numbers + world * (world + 1) // 2
    best: Optional[float] = None
    wrong = 0
    for _ in range(_ROUNDS):
        mine = numbers + (dist.get_rank() + 1)
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(mine)
        wrong += int((mine != expected).sum())
        taken = time.perf_counter() - begun
        best = taken if best is None else min(best, taken)
    assert best is not None
    problem = f"the all-reduce gave {wrong} wrong sums" if wrong else ""
    return Traffic(problem, numbers.numel() * 4, best, _clocks(world, device))


def _clocks(world: int, device: torch.device) -> tuple[float, ...]:
    """Offsets of all clocks; the smallest of several rounds, since a delayed process looks like a wrong clock."""
    import torch
    import torch.distributed as dist

    offsets = torch.full((world,), torch.inf, dtype=torch.float64)
    for _ in range(_ROUNDS):
        dist.barrier()
        mine = torch.tensor([time.time()], dtype=torch.float64, device=device)
        times = [torch.zeros_like(mine) for _ in range(world)]
        dist.all_gather(times, mine)
        seen = torch.cat(times).cpu()
        seen -= seen[dist.get_rank()].clone()
        offsets = torch.where(seen.abs() < offsets.abs(), seen, offsets)
    return tuple(offsets.tolist())
