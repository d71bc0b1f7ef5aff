"""Find slow ranks by their own time per step, without waits for data and, as far as possible, for other ranks."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from megatron_anymal.parallel import ParallelLayout
from megatron_anymal.resilience.events import record

RANK_SECONDS = "rank_seconds.jsonl"


class OwnTime:
    """Sums the time of marked sections of a step: GPU time on a GPU, else wall time.

    The forward passes are marked, since pipeline stages and replicas wait for each other outside of them. Tensor- and
    context-parallel ranks wait for each other inside, so a slow one makes its whole group look slow.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = self._begun = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time spent in the block."""
        self.start()
        yield
        self.stop()

    def start(self) -> None:
        """Begin a section; sections are not nested."""
        if not self._on_gpu:
            self._begun = time.perf_counter()
            return
        self._open = torch.cuda.Event(enable_timing=True)
        self._open.record()

    def stop(self) -> None:
        """Count the section that `start` began."""
        if not self._on_gpu:
            self._seconds += time.perf_counter() - self._begun
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._events.append((self._open, end))

    def take(self) -> float:
        """Return the seconds counted since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


def look_for_stragglers(
    seconds: Sequence[float], stages: Sequence[float], step: int, layout: ParallelLayout, ratio: float, run_dir: Path
) -> str:
    """Write every rank's own seconds to RUN/rank_seconds.jsonl, and report slow ranks.

    Args:
        seconds: own seconds per step of every rank.
        stages: pipeline stage of every rank.
        ratio: as for `stragglers`.

    Returns:
        The slow ranks and their times, on the reporting rank; empty if there are none.
    """
    if not layout.reports:
        return ""
    # A full disk must not end the run; the metrics log warns about it in the same step.
    with suppress(OSError), (run_dir / RANK_SECONDS).open("a") as file:
        file.write(json.dumps({"step": step, "seconds": [round(s, 6) for s in seconds]}) + "\n")
    slow = stragglers(seconds, stages, ratio)
    text = ", ".join(f"rank {rank} {own:.3f} (median {median:.3f})" for rank, (own, median) in slow.items())
    if slow:
        ranks = {str(rank): own for rank, (own, _) in slow.items()}
        record(run_dir, "straggler", text, step=step, ranks=ranks)
    return text


def stragglers(seconds: Sequence[float], stages: Sequence[float], ratio: float) -> dict[int, tuple[float, float]]:
    """Ranks slower than `ratio` times the median of their pipeline stage: rank -> (its seconds, the median).

    Args:
        seconds: seconds per step of every rank.
        stages: pipeline stage of every rank; only ranks of the same stage do comparable work.
    """
    slow = {}
    for rank, own in enumerate(seconds):
        median = statistics.median_low([s for s, stage in zip(seconds, stages) if stage == stages[rank]])
        if own > ratio * median:
            slow[rank] = (own, median)
    return slow
