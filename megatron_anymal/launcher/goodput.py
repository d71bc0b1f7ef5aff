"""How much of a run's time went into steps that count."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Effective:
    """Seconds of a run since its first start."""

    wall: float
    productive: float
    # Steps that count.
    steps: int

    @property
    def ratio(self) -> float:
        """Productive / wall; 0 without any time."""
        return self.productive / self.wall if self.wall else 0.0


def effective_time(run_dir: Path, events: Sequence[Mapping[str, Any]], *, complete: bool, kept: int) -> Effective:
    """The productive seconds of a run and those that went by.

    Args:
        complete: whether the run is done; else only steps up to the last good checkpoint survive.
        kept: that checkpoint's step; 0 without any.
    """
    starts = [float(event["time"]) for event in events if event["kind"] == "start"]
    ends = [float(event["time"]) for event in events if event["kind"] == "end"]
    if not starts:
        return Effective(0.0, 0.0, 0)
    # An earlier job's end says nothing of one that still runs.
    end = max(ends) if ends and max(ends) > max(starts) else time.time()
    productive, done = 0.0, 0
    for step, seconds in _step_seconds(run_dir / "metrics.jsonl"):
        if not complete and step > kept:
            # Of the line that the checkpoint lies within, the part before it.
            step = kept
        if step > done:
            productive += seconds * (step - done)
            done = step
    return Effective(end - min(starts), productive, done)


def _step_seconds(path: Path) -> list[tuple[int, float]]:
    """Step and mean seconds of the steps since the line before, in order; a resumed run writes lost lines anew."""
    found: dict[int, float] = {}
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            found[int(row["step"])] = float(row["step_seconds"])
        except (ValueError, KeyError, TypeError):
            # Half a line, or a validation's.
            continue
    return sorted(found.items())
