"""How long each restart of a run took, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

_FAILED = ("death", "hang", "exception")


@dataclass(frozen=True)
class Recovery:
    """A restart, from the first sign of the failure to the end of the first step after it.

    All times are in seconds; None: the event that begins or ends the phase is missing, since the attempt failed before
    it, or nothing recorded the failure.
    """

    # Number of the attempt that was started.
    attempt: int
    # How the launcher started its processes: standby or anew; empty if unknown.
    way: str
    # Until all ranks had ended or left the job and the launchers had decided to start again.
    ending: Optional[float]
    # Pause before the start.
    pause: Optional[float]
    # Until the ranks had joined and built the model.
    joining: Optional[float]
    # Restoring the state.
    restoring: Optional[float]
    # The first step, with the first read of data.
    first_step: Optional[float]
    # Ranks that kept their process; of several nodes, on the first.
    stayed: int = 0
    # What the run continued from: memory, or the name of a checkpoint; empty: it began at step 0.
    source: str = ""

    @property
    def total(self) -> Optional[float]:
        """Sum of the phases, in seconds; None if no step was finished."""
        parts = (self.ending, self.pause, self.joining, self.restoring, self.first_step)
        return None if self.first_step is None else sum(part for part in parts if part is not None)

    def __str__(self) -> str:
        phases = {
            "ending the attempt": self.ending,
            "pause": self.pause,
            "ranks ready": self.joining,
            "restore": self.restoring,
            "first step": self.first_step,
        }
        listed = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items() if seconds is not None)
        way = {"standby": ", forked from the standby process", "anew": ", started anew"}.get(self.way, "")
        if self.stayed:
            way += f" except {self.stayed} that stayed"
        total = "did not reach a step" if self.total is None else f"{self.total:.1f} s"
        source = f", from {self.source}" if self.source else ""
        return f"attempt {self.attempt}{way}{source}: {total} ({listed})"


def recoveries(events: Sequence[Mapping[str, Any]]) -> list[Recovery]:
    """Restarts among a run's events, in order."""
    rows = []
    for before, restart in ((event.get("attempt", 0), event) for event in events if event["kind"] == "restart"):
        mine = [event for event in events if event.get("attempt", 0) == before + 1]
        failed = [e for e in events if e.get("attempt", 0) == before and e["kind"] in _FAILED]
        begun = next((e for e in mine if e["kind"] == "start" and "launcher" in e), None)
        ranks = next((e for e in mine if e["kind"] == "start" and "launcher" not in e), None)
        resumed = next((e for e in mine if e["kind"] == "resume"), ranks)
        first_step = next((e for e in mine if e["kind"] == "first_step"), None)
        rows.append(
            Recovery(
                before + 1,
                str((begun or {}).get("way", "")),
                _between(failed[0] if failed else None, restart),
                _between(restart, begun),
                _between(begun, ranks),
                _between(ranks, resumed),
                _between(resumed, first_step),
                int((begun or {}).get("stayed", 0)),
                str((resumed or {}).get("source", "")),
            )
        )
    return rows


def _between(first: Optional[Mapping[str, Any]], second: Optional[Mapping[str, Any]]) -> Optional[float]:
    return None if first is None or second is None else max(0.0, float(second["time"]) - float(first["time"]))
