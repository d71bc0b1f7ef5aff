"""Event log of a run: RUN/events.jsonl, one JSON object per line, written by every process.

Each line is a single write to a file opened for appending, so that lines of processes on one machine do not interleave.
Readers skip lines they cannot parse, such as a partial line left by a machine that crashed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
# Number of the attempt, counted over all jobs of the run; set by the launcher.
ATTEMPT = "ANYMAL_ATTEMPT"


def record(run_dir: Path | str, kind: str, text: str, **more: Any) -> None:
    """Append an event. A write failure is only reported on standard error, since it must not stop the run.

    Args:
        kind: start, resume, first_step, saved, save_failed, copies, skipped_step, stop_requested, stopped, exception,
            death, hang, straggler, restart, crash_loop, locked or end.
        text: human-readable description, without the kind.
        more: further values, or values that replace `rank`, `attempt` or `step` (-1 if there is none).
    """
    event = {
        "time": time.time(),
        "kind": kind,
        "rank": _number("RANK", -1),
        "node": socket.gethostname(),
        "attempt": _number(ATTEMPT, 0),
        "step": -1,
        "text": text,
        **more,
    }
    try:
        line = json.dumps(event, default=str) + "\n"
        path = Path(run_dir) / EVENTS
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except (OSError, ValueError, TypeError) as error:
        print(f"warning: the event {kind!r} ({text}) could not be written: {error}.", file=sys.stderr, flush=True)


def read(run_dir: Path | str) -> list[dict[str, Any]]:
    """Events of a run, sorted by time; empty if there are none."""
    try:
        lines = (Path(run_dir) / EVENTS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and isinstance(event.get("time"), (int, float)) and "kind" in event:
            events.append(event)
    return sorted(events, key=lambda event: float(event["time"]))


def _number(variable: str, without: int) -> int:
    try:
        return int(os.environ.get(variable, without))
    except ValueError:
        return without
