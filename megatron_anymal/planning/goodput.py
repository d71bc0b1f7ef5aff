"""Goodput of a job that fails: the expected share of wall time that goes into steps that are kept, in closed form.

The job fails as a Poisson process. A failure at any time, in a recovery too, starts a recovery from the beginning; then
the job continues from the newest saved state. A save to disk stalls the steps, is written while they continue, and
counts from the end of the writing on; a failure before that loses it. The next save waits for the writing of the one
before. Snapshots in the memory of peers count at once and survive the failures that they cover.

The ratio is exact under these assumptions (renewal-reward theorem): the ends of the writings are regeneration points,
so it is E[seconds of steps newly saved] / E[wall seconds] between two of them. docs/operations/goodput.md derives both.
With saves to disk that wait for their writing it is that of Daly, "A higher order estimate of the optimum checkpoint
interval for restart dumps", FGCS 22(3), 2006.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class RecoveryTime:
    """Time from a failure to the point from which steps run at their usual pace again."""

    # Seconds after a failure that leaves all nodes usable.
    seconds: float
    # Further seconds if a node is lost.
    lost_node_seconds: float = 0.0
    # Share of failures that lose a node.
    lost_node_share: float = 0.0

    @property
    def mean(self) -> float:
        """Mean seconds, without further failures."""
        return self.seconds + self.lost_node_share * self.lost_node_seconds

    def undisturbed(self, rate: float) -> float:
        """Probability that a recovery ends without another failure; `rate` in failures per second."""
        usual = math.exp(-rate * self.seconds)
        lost = math.exp(-rate * (self.seconds + self.lost_node_seconds))
        return usual + self.lost_node_share * (lost - usual)


@dataclass(frozen=True)
class PeerSnapshots:
    """Snapshots of the training state in the memory of other nodes."""

    # Steps between snapshots.
    every: int
    # Seconds that a snapshot holds the steps up.
    stall: float
    # Share of failures that leave every part of the state in some node's memory; below 1, since a few take many nodes.
    coverage: float
    # Recovery from such a failure.
    recovery: RecoveryTime


@dataclass(frozen=True)
class FailingJob:
    """A job that fails and saves."""

    # Mean seconds between failures of the whole job; infinite if it never fails.
    mtbf: float
    # Seconds per step.
    step: float
    # Seconds that a save to disk holds the steps up.
    stall: float
    # Seconds from then until the save can be resumed from, while the steps continue.
    write: float
    # Recovery from the disk.
    recovery: RecoveryTime
    # None: saves to disk only.
    peers: Optional[PeerSnapshots] = None

    @property
    def unit(self) -> int:
        """Steps that the save interval is a multiple of."""
        return self.peers.every if self.peers else 1


@dataclass(frozen=True)
class Shares:
    """Shares of the wall time; their sum is 1."""

    # Steps that are kept: the effective-training-time ratio.
    ratio: float
    # Steps held up by saves and snapshots.
    stalls: float
    # Steps that failures undid.
    lost: float
    # From a failure until the steps run again.
    recovery: float


def shares(job: FailingJob, save_every: int) -> Shares:
    """Expected shares of the wall time in the long run.

    Args:
        save_every: steps between saves, a multiple of `job.unit`.
    """
    cycle = _Cycle.of(job, save_every)
    if math.isinf(job.mtbf):
        wall = max(cycle.steps_end, cycle.write) + cycle.stall
        return Shares(cycle.kept / wall, 1.0 - cycle.kept / wall, 0.0, 0.0)
    rate = 1.0 / job.mtbf
    after = _AfterFailure.of(job, rate)
    if math.isinf(after.seconds):
        return Shares(0.0, 0.0, 0.0, 1.0)
    up = 1.0 / (1.0 + rate * after.seconds)
    try:
        ratio, stalls = _between_saves(cycle, after, rate)
    except OverflowError:
        ratio, stalls = 0.0, 0.0
    return Shares(ratio, stalls, max(0.0, up - ratio - stalls), 1.0 - up)


@dataclass(frozen=True)
class _AfterFailure:
    """What follows a failure while steps run."""

    # Expected seconds until they run again.
    seconds: float
    # Probability that they continue from the disk rather than from a snapshot in memory.
    to_disk: float

    @staticmethod
    def of(job: FailingJob, rate: float) -> _AfterFailure:
        ends = job.recovery.undisturbed(rate)
        from_disk = (1.0 - ends) / (rate * ends) if rate * ends else math.inf
        if job.peers is None:
            return _AfterFailure(from_disk, 1.0)
        # Another failure during the recovery either leaves the memory as it is, or sends the job to the disk.
        coverage, ends = job.peers.coverage, job.peers.recovery.undisturbed(rate)
        last = 1.0 - coverage * (1.0 - ends)
        seconds = (1.0 - ends) * (1.0 / rate + (1.0 - coverage) * from_disk) / last
        return _AfterFailure(coverage * seconds + (1.0 - coverage) * from_disk, (1.0 - coverage) / last)


@dataclass(frozen=True)
class _Cycle:
    """One interval between saves without failures: `segments` times steps and a snapshot, then the save's stall."""

    segments: int
    # Seconds of steps, and of the snapshot after them, in a segment.
    work: float
    snapshot: float
    # Seconds of the save.
    stall: float
    write: float

    @staticmethod
    def of(job: FailingJob, save_every: int) -> _Cycle:
        snapshot = job.peers.stall if job.peers else 0.0
        segments = save_every // job.unit if job.peers else 1
        return _Cycle(segments, save_every * job.step / segments, snapshot, job.stall, job.write)

    @property
    def segment(self) -> float:
        return self.work + self.snapshot

    @property
    def steps_end(self) -> float:
        """Seconds from the end of a save's stall to the next save, if that need not wait."""
        return self.segments * self.segment

    @property
    def kept(self) -> float:
        """Seconds of steps in the cycle."""
        return self.segments * self.work


@dataclass(frozen=True)
class _Stretch:
    """Seconds of steps followed by seconds of stall, ended early by the first failure."""

    rate: float
    work: float
    stall: float

    @property
    def fails(self) -> float:
        """Probability of a failure."""
        return -math.expm1(-self.rate * (self.work + self.stall))

    @property
    def seconds(self) -> float:
        """Expected seconds until the end or the failure."""
        return self.fails / self.rate

    @property
    def stalled(self) -> float:
        """Expected seconds of these in the stall."""
        return math.exp(-self.rate * self.work) * -math.expm1(-self.rate * self.stall) / self.rate


def _between_saves(cycle: _Cycle, after: _AfterFailure, rate: float) -> tuple[float, float]:
    """Expected seconds of newly kept steps and of stalls between the ends of two writings, per expected wall second.

    V(i) is the expected cost from a restart at the i-th snapshot of a cycle until a save has been written. A segment
    fails with probability f and then continues from its own snapshot with probability s, so that
    V(i) = cost of a segment + (1 - f) V(i+1) + f (cost of a failure + s V(i) + (1 - s) V(0)),
    which V(i) = V(0) - B (g^i - 1) solves, with g = (1 - f s) / (1 - f) = 1 + (1 - s) (exp(rate segment) - 1).
    V(segments) is the cost from the beginning of the save on, which closes the system.
    """
    segment, s = _Stretch(rate, cycle.work, cycle.snapshot), 1.0 - after.to_disk
    log_g = math.log1p(after.to_disk * math.expm1(rate * cycle.segment))
    window = _Window.of(cycle, rate, segment.fails * s, log_g)

    def cost(of: Callable[[_Stretch], float], failure: float) -> float:
        b = (of(segment) / segment.fails + failure) / after.to_disk
        through = window.cost(of) + window.fails * failure
        grown = math.expm1(cycle.segments * log_g)
        start = math.exp(rate * (cycle.stall + cycle.write)) * (through + b * (grown - s * window.growth))
        # From the end of a writing: the rest of the segment that the steps have reached meanwhile, then as above.
        reached, rest = window.rest
        if reached == cycle.segments:
            return start - b * grown
        again = s * rest.fails * math.expm1(reached * log_g)
        further = (1.0 - rest.fails) * math.expm1((reached + 1) * log_g)
        return of(rest) + rest.fails * failure + start - b * (again + further)

    wall = cost(lambda stretch: stretch.seconds, after.seconds)
    stalls = cost(lambda stretch: stretch.stalled, 0.0)
    if not math.isfinite(wall + stalls):
        raise OverflowError
    # A covered failure in the window loses the save and keeps the steps, which a later save then saves too.
    kept = cycle.kept * (1.0 + s * window.skipped / (1.0 - s * window.retried))
    return kept / wall, stalls / wall


@dataclass(frozen=True)
class _Window:
    """From the beginning of a save to the end of its writing, in which a failure loses the save."""

    cycle: _Cycle
    rate: float
    # Segments that end in the window.
    whole: int
    # The rest of the writing: the beginning of a segment, or, if all have ended, the wait of the next save.
    last: _Stretch
    # Probability of a failure in the window.
    fails: float
    # Sum over the failures in the window, by the snapshot i that they fall back to, of probability x (g^i - 1).
    growth: float
    # The same of probability x g^(i - segments): that the next save begins without a restart from the disk before it.
    retried: float
    # The same times the number of saves that are lost by then.
    skipped: float

    @staticmethod
    def of(cycle: _Cycle, rate: float, retries: float, log_g: float) -> _Window:
        """Args: `retries`: f s, and `log_g`, of `_between_saves`."""
        whole = min(cycle.segments, int(cycle.write / cycle.segment))
        more = cycle.write - whole * cycle.segment
        waits = whole == cycle.segments
        work = 0.0 if waits else min(more, cycle.work)
        last = _Stretch(rate, work, more - work)
        stalled = math.exp(-rate * cycle.stall)
        f = -math.expm1(-rate * cycle.segment)
        same = stalled * f * _geometric(math.log1p(-retries), whole)
        failed = stalled * f * _geometric(-rate * cycle.segment, whole)
        at_last = math.exp(-rate * (cycle.stall + whole * cycle.segment)) * last.fails
        # A failure while the next save waits loses two saves, and continues at the beginning of a cycle.
        falls_to = 0 if waits else whole
        through = math.exp(-cycle.segments * log_g)
        retried = through * (1.0 - stalled + same) + at_last * math.exp((falls_to - cycle.segments) * log_g)
        return _Window(
            cycle,
            rate,
            whole,
            last,
            fails=-math.expm1(-rate * (cycle.stall + cycle.write)),
            growth=same - failed + at_last * math.expm1(falls_to * log_g),
            retried=retried,
            skipped=retried + (through * at_last if waits else 0.0),
        )

    def cost(self, of: Callable[[_Stretch], float]) -> float:
        """Expected cost until the end of the window or the first failure."""
        cycle, rate = self.cycle, self.rate
        segments = of(_Stretch(rate, cycle.work, cycle.snapshot)) * _geometric(-rate * cycle.segment, self.whole)
        after = segments + math.exp(-rate * self.whole * cycle.segment) * of(self.last)
        return of(_Stretch(rate, 0.0, cycle.stall)) + math.exp(-rate * cycle.stall) * after

    @property
    def rest(self) -> tuple[int, _Stretch]:
        """Segments that end in the window, and what remains of the one in progress at its end."""
        work = self.cycle.work - self.last.work
        return self.whole, _Stretch(self.rate, work, self.cycle.snapshot - self.last.stall)


def _geometric(log_q: float, n: int) -> float:
    """1 + q + ... + q^(n - 1), from log q <= 0."""
    return math.expm1(n * log_q) / math.expm1(log_q) if log_q else float(n)
