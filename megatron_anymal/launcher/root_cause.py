"""Which failure of an attempt came first, and which ones followed from it."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_KINDS = ("death", "hang", "exception")
# A death by a signal is noticed from outside, a moment later than an exception that it caused in another rank.
_NOTICED_LATE = 2.0
# Signals that a process gets, or sends itself, because another one has failed.
_FOLLOWING = (signal.SIGABRT, signal.SIGTERM)


@dataclass(frozen=True)
class Failure:
    """What failed in one attempt."""

    attempt: int
    # The event of what came first.
    first: Mapping[str, Any]
    # Those of what followed, in order.
    others: tuple[Mapping[str, Any], ...]


def failures(events: Sequence[Mapping[str, Any]]) -> list[Failure]:
    """The failures among a run's events, in order, one an attempt."""
    of_attempt: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["kind"] in _KINDS:
            of_attempt.setdefault(int(event.get("attempt", 0)), []).append(event)
    return [_sorted(attempt, found) for attempt, found in sorted(of_attempt.items())]


def _sorted(attempt: int, found: list[Mapping[str, Any]]) -> Failure:
    told = {event.get("rank") for event in found if event["kind"] == "exception"}
    # What a rank says of its own end says more than its exit code.
    found = [e for e in found if not (e["kind"] == "death" and "signal" not in e and e.get("rank") in told)]
    ordered = sorted(found, key=_when)
    return Failure(attempt, ordered[0], tuple(ordered[1:]))


def _when(event: Mapping[str, Any]) -> float:
    at = float(event["time"])
    if event["kind"] == "death" and event.get("signal") not in (None, *_FOLLOWING):
        return at - _NOTICED_LATE
    if event["kind"] != "hang" or not event.get("ranks"):
        return at
    # Of several nodes that see the same hang, the one that has the rank that causes it: what is seen of a stopped
    # process is certain, a rank that does not come to a collective operation may wait for one of another node.
    return at - _NOTICED_LATE * (1 if event.get("cause") == "collective" else 2)
