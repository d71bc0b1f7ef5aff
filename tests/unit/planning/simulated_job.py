"""A job that fails, saves and recovers, simulated event by event: the oracle of the formula in planning/goodput.py.

It shares nothing with the formula but the description of a job. Steps, stalls, writings and recoveries pass one after
the other on a clock; the next failure is drawn from an exponential distribution.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Optional

from megatron_anymal.planning.goodput import FailingJob, RecoveryTime

KINDS = ("steps", "stalls", "recovery")


@dataclass
class Epoch:
    """From the end of one writing to that of the next: a renewal of the process."""

    wall: float = 0.0
    kept: float = 0.0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))


class SimulatedJob:
    def __init__(self, job: FailingJob, save_every: int, seed: int) -> None:
        self.job, self.save_every, self.random = job, save_every, random.Random(seed)
        self.now, self.fails_at = 0.0, self.random.expovariate(1.0 / job.mtbf)
        # Steps: of the state, of the newest save on disk, of the newest snapshot.
        self.step = self.disk = self.memory = 0
        # Step of the save being written, and when that ends.
        self.writing: Optional[tuple[int, float]] = None
        self.epochs = [Epoch()]

    def run(self, epochs: int) -> list[Epoch]:
        """Epochs without the first, which does not begin at the end of a writing, and the last, which is not over."""
        while len(self.epochs) < epochs + 2:
            if not self.advance():
                self.recover()
        return self.epochs[1:-1]

    def advance(self) -> bool:
        """A step and what follows it; False: a failure."""
        job = self.job
        if not self.passes(job.step, "steps"):
            return False
        self.step += 1
        if job.peers and self.step % job.peers.every == 0:
            if not self.passes(job.peers.stall, "stalls"):
                return False
            self.memory = self.step
        if self.step % self.save_every == 0:
            if self.writing and not self.passes(self.writing[1] - self.now, "stalls"):
                return False
            if not self.passes(job.stall, "stalls"):
                return False
            self.writing = (self.step, self.now + job.write)
        return True

    def passes(self, seconds: float, kind: str) -> bool:
        """Let time pass; False: a failure came before the end."""
        end = self.now + seconds
        while True:
            written = self.writing[1] if self.writing else math.inf
            until = min(end, written, self.fails_at)
            self.epochs[-1].spent[kind] += until - self.now
            self.epochs[-1].wall += until - self.now
            self.now = until
            if self.writing and until == written:
                self.epochs[-1].kept += (self.writing[0] - self.disk) * self.job.step
                self.disk, self.writing = self.writing[0], None
                self.epochs.append(Epoch())
            elif until == self.fails_at:
                self.fails_at = self.now + self.random.expovariate(1.0 / self.job.mtbf)
                return False
            else:
                return True

    def recover(self) -> None:
        self.writing = None
        peers, in_memory = self.job.peers, self.job.peers is not None
        while True:
            in_memory = in_memory and peers is not None and self.random.random() < peers.coverage
            recovery: RecoveryTime = peers.recovery if in_memory and peers else self.job.recovery
            lost = self.random.random() < recovery.lost_node_share
            if self.passes(recovery.seconds + (recovery.lost_node_seconds if lost else 0.0), "recovery"):
                break
        self.step = self.memory if in_memory else self.disk
        self.memory = self.step


def estimate(epochs: list[Epoch], values: list[float]) -> tuple[float, float]:
    """Sum of the values per wall second, and its standard error (ratio estimator of independent epochs)."""
    mean = sum(values) / sum(epoch.wall for epoch in epochs)
    squares = sum((value - mean * epoch.wall) ** 2 for value, epoch in zip(values, epochs))
    wall = sum(epoch.wall for epoch in epochs) / len(epochs)
    return mean, math.sqrt(squares) / len(epochs) / wall
