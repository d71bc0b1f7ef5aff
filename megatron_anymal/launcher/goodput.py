"""Goodput: the share of a run's wall time that went into steps that were kept."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Effective:
    """Wall and productive time of a run since its first start, in seconds."""

    # Seconds from the first start to the end, or until now.
    wall: float
    # Seconds spent on steps that were kept.
    productive: float
    # Number of productive steps.
    steps: int

    @property
    def ratio(self) -> float:
        """Productive / wall; 0 if no time has passed."""
        return self.productive / self.wall if self.wall else 0.0


def effective_time(run_dir: Path, events: Sequence[Mapping[str, Any]], *, complete: bool, kept: int) -> Effective:
    """Compute the wall time of a run and its productive share.

    Args:
        complete: whether the run is done; if not, only steps up to the last good checkpoint count.
        kept: step of that checkpoint; 0 if there is none.
    """
    starts = [float(event["time"]) for event in events if event["kind"] == "start"]
    ends = [float(event["time"]) for event in events if event["kind"] == "end"]
    if not starts:
        return Effective(0.0, 0.0, 0)
    # An end event of an earlier job does not apply if a later one is still running.
    end = max(ends) if ends and max(ends) > max(starts) else time.time()
    productive, done = 0.0, 0
    for step, seconds in step_seconds(run_dir):
        if not complete and step > kept:
            # If the checkpoint lies between two log lines, count only the steps before it.
            step = kept
        if step > done:
            productive += seconds * (step - done)
            done = step
    return Effective(end - min(starts), productive, done)


def step_seconds(run_dir: Path) -> list[tuple[int, float]]:
    """Read (step, mean seconds per step since the previous line) from metrics.jsonl, in the order of steps.

    For repeated steps the last line counts. Empty if there is no such file.
    """
    by_step: dict[int, float] = {}
    try:
        lines = (run_dir / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            by_step[int(row["step"])] = float(row["step_seconds"])
        except (ValueError, KeyError, TypeError):
            # A partial line, or one of a validation.
            continue
    return sorted(by_step.items())
