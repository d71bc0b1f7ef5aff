"""Inputs of the goodput model that a run's folder holds: its failures, recoveries, saves and steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.config import ConfigError
from megatron_anymal.launcher.goodput import effective_time, step_seconds
from megatron_anymal.launcher.root_cause import AttemptFailure, failures
from megatron_anymal.planning.goodput_inputs import Value
from megatron_anymal.resilience.events import EVENTS, read
from megatron_anymal.resilience.exit_codes import Exit
from megatron_anymal.telemetry import duration

Event = Mapping[str, Any]


@dataclass
class MeasuredRun:
    """What a run's folder says."""

    # Name of an input -> its value.
    values: dict[str, Value] = field(default_factory=dict)
    # Statements for the reader.
    notes: list[str] = field(default_factory=list)
    # Number of processes, one per GPU; 0: unknown.
    processes: int = 0


def measure(run_dir: Path) -> MeasuredRun:
    """Measure the inputs that the folder of a run holds; what it does not hold is left out, and a note says so.

    Raises:
        ConfigError: the folder does not exist, or is not that of a run.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"--run: there is no folder {str(run_dir)!r}. Name a run's folder.")
    events, steps = read(run_dir), [seconds for _, seconds in step_seconds(run_dir)]
    if not events and not steps:
        raise ConfigError(
            f"--run: {str(run_dir)!r} has neither {EVENTS} nor metrics.jsonl. Name a run's folder, the one with "
            "checkpoints/ in it (exp_manager.explicit_log_dir)."
        )
    run = MeasuredRun(processes=max((int(e.get("processes", 0)) for e in events if e["kind"] == "start"), default=0))
    if steps:
        run.values["step_seconds"] = Value(statistics.median(steps), f"measured: median of {_count(steps, 'log line')}")
    _saves(run, events)
    _recoveries(run, events, statistics.median(steps) if steps else 0.0)
    _mtbf(run, events)
    _ratio(run, run_dir, events)
    return run


def _saves(run: MeasuredRun, events: Sequence[Event]) -> None:
    saved = [event for event in events if event["kind"] == "saved"]
    timed = [event for event in saved if "stalled" in event]
    if timed:
        origin = f"measured: mean of {_count(timed, 'save')}"
        stall = statistics.fmean(event["stalled"] for event in timed)
        whole = statistics.fmean(event["seconds"] for event in timed)
        run.values["stall_seconds"] = Value(stall, origin)
        run.values["write_seconds"] = Value(max(0.0, whole - stall), origin)
    # The last step of an attempt is saved too, whatever the interval.
    gaps = [b["step"] - a["step"] for a, b in pairwise(saved) if b["step"] > a["step"]]
    if gaps:
        run.values["save_every"] = Value(statistics.mode(gaps), f"measured: usual distance of {_count(saved, 'save')}")
    _copies(run, [event for event in events if event["kind"] == "copies"])


def _copies(run: MeasuredRun, copies: Sequence[Event]) -> None:
    """Copies in memory, if the model can represent them: a save follows a copy."""
    if not copies:
        return
    every, save_every = int(copies[-1]["interval"]), run.values.get("save_every")
    if save_every is not None and int(save_every.number) % every:
        run.notes.append(
            f"Copies in memory every {every} steps are left out: the save interval, {save_every.number:g} steps, is "
            f"not a multiple of {every}."
        )
        return
    seconds = statistics.fmean(event["seconds"] for event in copies)
    run.values["peer_every"] = Value(every, "measured: copies in memory (resilience.peer_memory)")
    run.values["peer_stall_seconds"] = Value(seconds, f"measured: mean of {_count(copies, 'start')}")


@dataclass
class _Start:
    """A start of the ranks. Times are in seconds since 1970, None if the event is missing."""

    # When the launcher decided to restart, or else began.
    begun: Optional[float]
    # When all ranks were built.
    ready: float
    restored: Optional[float] = None
    # From memory, not from a checkpoint.
    from_memory: bool = False
    # End of the first step.
    stepped: Optional[float] = None


def _starts(events: Sequence[Event]) -> list[_Start]:
    starts: list[_Start] = []
    begun = None
    for event in events:
        kind, at = event["kind"], float(event["time"])
        launcher = int(event.get("rank", -1)) < 0
        if kind == "restart":
            begun = at
        elif kind == "end" and launcher:
            begun = None
        elif kind == "start" and launcher:
            begun = begun or at
        elif kind == "start":
            starts.append(_Start(begun, at))
            begun = None
        elif starts and kind == "resume":
            starts[-1].restored, starts[-1].from_memory = at, event.get("source") == "memory"
        elif starts and kind == "first_step":
            starts[-1].stepped = at
    return starts


def _recoveries(run: MeasuredRun, events: Sequence[Event], step: float) -> None:
    """Phases of recoveries: those after a failure from the failures, the others from all starts."""
    starts, restarts = _starts(events), {e.get("attempt"): float(e["time"]) for e in events if e["kind"] == "restart"}
    ended = [_silence(f) + restarts[f.attempt] - _time(f) for f in failures(events) if f.attempt in restarts]
    again = [start for start in starts if start.begun in restarts.values()]
    ready = [start.ready - start.begun for start in again or starts if start.begun is not None]
    restored, remembered = (
        [s.restored - s.ready for s in starts if s.restored is not None and s.from_memory == memory]
        for memory in (False, True)
    )
    first = [start.stepped - (start.restored or start.ready) - step for start in starts if start.stepped is not None]
    _add(run, "detection_seconds", ended, "failure")
    _add(run, "processes_seconds", ready, "restart" if again else "start")
    _add(run, "restore_seconds", restored, "resumed start")
    if "peer_every" in run.values:
        _add(run, "peer_restore_seconds", remembered, "copy")
    _add(run, "first_step_seconds", first, "start")
    if ready:
        run.values["groups_seconds"] = Value(0.0, "measured: contained in processes_seconds")
    if again:
        run.values["lost_node_share"] = Value(0.0, "measured: lost nodes are among the restarts")
    whole = _whole(events, restarts, starts)
    if whole:
        run.notes.append(
            f"From a failure to the end of the next step it took {statistics.fmean(whole):.1f} s (mean of "
            f"{_count(whole, 'recovery')}, {min(whole):.1f} to {max(whole):.1f} s)."
        )


def _whole(events: Sequence[Event], restarts: Mapping[Any, float], starts: Sequence[_Start]) -> list[float]:
    """Seconds from each failure to the end of the first step after it; for a hang, from the last sign of progress."""
    stepped = {start.begun: start.stepped for start in starts}
    durations = []
    for failure in failures(events):
        end = stepped.get(restarts.get(failure.attempt))
        if failure.attempt in restarts and end is not None:
            durations.append(end - _time(failure) + _silence(failure))
    return durations


def _mtbf(run: MeasuredRun, events: Sequence[Event]) -> None:
    """Time that the attempts ran, or that the launcher took to restart, divided by the number of failures."""
    spans: dict[int, list[float]] = {}
    ends: set[int] = set()
    for event in events:
        attempt = int(event.get("attempt", 0))
        if attempt > 0:
            spans.setdefault(attempt, []).append(float(event["time"]))
            if event["kind"] in ("restart", "end") and int(event.get("rank", -1)) < 0:
                ends.add(attempt)
    if not spans:
        run.notes.append("The run was not started by anymal launch: its log has no failures to count.")
        return
    restarted = {int(e.get("attempt", 0)): float(e["time"]) for e in events if e["kind"] == "restart"}
    pauses = [spans[n + 1][0] - at for n, at in restarted.items() if n + 1 in spans]
    ran = sum(times[-1] - times[0] for times in spans.values()) + sum(pauses)
    failed = {failure.attempt for failure in failures(events) if failure.attempt > 0 and _restarts(failure)}
    # A launcher that was killed with its ranks leaves no event.
    failed |= {n for n in spans if n not in ends and n != max(spans)}
    if not failed or not run.processes:
        run.notes.append(f"No failure in {duration(ran)}." if not failed else "The number of processes is not known.")
        return
    # Standard error of the mean of exponential times.
    error = len(failed) ** -0.5
    origin = f"measured: {_count(failed, 'failure')} in {duration(ran)} on {run.processes} processes, +- {error:.0%}"
    run.values["mtbf_per_gpu_hours"] = Value(ran * run.processes / len(failed) / 3600.0, origin)


def _ratio(run: MeasuredRun, run_dir: Path, events: Sequence[Event]) -> None:
    """Note the ratio that the run itself had, if it has ended."""
    starts = [float(event["time"]) for event in events if event["kind"] == "start"]
    ends = [event for event in events if event["kind"] == "end"]
    if not starts or not ends or float(ends[-1]["time"]) < max(starts):
        return
    complete = any(int(event.get("exit_code", 0)) == Exit.DONE for event in ends)
    kept = max((int(event["step"]) for event in events if event["kind"] == "saved"), default=0)
    effective = effective_time(run_dir, events, complete=complete, kept=kept)
    run.notes.append(
        f"The run's own effective-training-time ratio, with start-up, validation and waits between jobs, was "
        f"{effective.ratio:.2%} of {duration(effective.wall)}."
    )


def _add(run: MeasuredRun, name: str, seconds: Sequence[float], what: str) -> None:
    if seconds:
        mean = max(0.0, statistics.fmean(seconds))
        run.values[name] = Value(mean, f"measured: mean of {_count(seconds, what)}")


def _restarts(failure: AttemptFailure) -> bool:
    """Whether a failure is one after which a restart helps, not a mistake in a setting."""
    code = failure.first.get("exit_code")
    return code is None or code not in set(Exit) or Exit(code).restarts


def _time(failure: AttemptFailure) -> float:
    return min(float(event["time"]) for event in (failure.first, *failure.others))


def _silence(failure: AttemptFailure) -> float:
    """Seconds that a hang lasted before it was recorded."""
    return float(failure.first.get("silent", 0.0))


def _count(items: Any, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{len(items)} {noun if len(items) == 1 else plural}"
