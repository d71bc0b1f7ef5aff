"""Separate the first failure of an attempt from the failures it caused."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_KINDS = ("death", "hang", "exception")
# Seconds. A death by a signal is only noticed by the launcher, after an exception it may have caused in another rank.
_NOTICED_LATE = 2.0
# Signals that a process receives, or sends to itself, because another one has failed.
_FOLLOWING = (signal.SIGABRT, signal.SIGTERM)


@dataclass(frozen=True)
class AttemptFailure:
    """Failure of one attempt."""

    # Number of the attempt.
    attempt: int
    # Event of the first failure.
    first: Mapping[str, Any]
    # Events of the failures that followed, in order.
    others: tuple[Mapping[str, Any], ...]


def failures(events: Sequence[Mapping[str, Any]]) -> list[AttemptFailure]:
    """Failures among a run's events, one per failed attempt, in order."""
    by_attempt: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["kind"] in _KINDS:
            by_attempt.setdefault(int(event.get("attempt", 0)), []).append(event)
    return [_sorted(attempt, failed) for attempt, failed in sorted(by_attempt.items())]


def _sorted(attempt: int, events: list[Mapping[str, Any]]) -> AttemptFailure:
    raised = {event.get("rank") for event in events if event["kind"] == "exception"}
    # The exception that a rank recorded is more informative than its exit code.
    events = [e for e in events if not (e["kind"] == "death" and "signal" not in e and e.get("rank") in raised)]
    ordered = sorted(events, key=_when)
    return AttemptFailure(attempt, ordered[0], tuple(ordered[1:]))


def _when(event: Mapping[str, Any]) -> float:
    at = float(event["time"])
    if event["kind"] == "death" and event.get("signal") not in (None, *_FOLLOWING):
        return at - _NOTICED_LATE
    if event["kind"] != "hang" or not event.get("ranks"):
        return at
    # If several nodes report the same hang, the one with the rank that causes it comes first. A stopped process is
    # certain evidence; a rank that does not reach a collective operation may be waiting for one on another node.
    return at - _NOTICED_LATE * (1 if event.get("cause") == "collective" else 2)
