"""Phases of a restart, from a run's events."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_anymal.launcher.recoveries import recoveries


def event(at: float, kind: str, attempt: int, **more: Any) -> dict[str, Any]:
    return {"time": at, "kind": kind, "attempt": attempt, "text": "", **more}


FIRST = [
    event(0.0, "start", 1, launcher="torchrun", way="standby"),
    event(3.0, "start", 1),
    event(4.0, "first_step", 1),
]
SECOND = [
    event(12.0, "start", 2, launcher="torchrun", way="anew"),
    event(17.0, "start", 2),
    event(19.0, "resume", 2),
    event(20.5, "first_step", 2),
]


def test_phases_follow_each_other() -> None:
    failed = [event(10.0, "death", 1), event(10.5, "exception", 1), event(11.0, "restart", 1)]
    [recovery] = recoveries([*FIRST, *failed, *SECOND])
    assert (recovery.attempt, recovery.way, recovery.total) == (2, "anew", 10.5)
    assert str(recovery) == (
        "attempt 2, started anew: 10.5 s (ending the attempt 1.0 s, pause 1.0 s, ranks ready 5.0 s, restore 2.0 s, "
        "first step 1.5 s)"
    )


def test_where_the_state_came_from_is_told() -> None:
    second = [{**row, "source": "memory"} if row["kind"] == "resume" else row for row in SECOND]
    [recovery] = recoveries([*FIRST, event(11.0, "restart", 1), *second])
    assert str(recovery).startswith("attempt 2, started anew, from memory: 9.5 s (")


def test_ranks_that_stayed_are_told() -> None:
    second = [{**row, "way": "standby", "stayed": 3} if "launcher" in row else row for row in SECOND]
    [recovery] = recoveries([*FIRST, event(11.0, "restart", 1), *second])
    assert recovery.stayed == 3
    assert str(recovery).startswith("attempt 2, forked from the standby process except 3 that stayed: 9.5 s (")


def test_what_is_missing_is_left_out() -> None:
    # No event reported the failure, and there was no checkpoint.
    without = [row for row in SECOND if row["kind"] != "resume"]
    [recovery] = recoveries([*FIRST, event(11.0, "restart", 1), *without])
    assert recovery.ending is None and recovery.restoring == 0.0 and recovery.total == 9.5
    # It failed again before its first step.
    [again] = recoveries([*FIRST, event(11.0, "restart", 1), SECOND[0], event(14.0, "death", 2)])
    assert again.total is None and again.joining is None
    assert str(again) == "attempt 2, started anew: did not reach a step (pause 1.0 s)"


@pytest.mark.parametrize("events", [[], FIRST])
def test_no_restart(events: list[dict[str, Any]]) -> None:
    assert recoveries(events) == []
