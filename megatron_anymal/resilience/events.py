"""What happened to a run, in order: RUN/events.jsonl, one JSON object a line, written by every process.

Each line is one write to a file opened for appending, so that lines of several processes do not mix on one machine.
What a reader cannot parse (half a line of a machine that crashed) is left out.
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
# Numbers the starts of a run, over all jobs that worked on it; set by the launcher.
ATTEMPT = "ANYMAL_ATTEMPT"


def record(run_dir: Path | str, kind: str, text: str, **more: Any) -> None:
    """Add an event. A failure to write is told on standard error and no more: no event may stop a run.

    Args:
        kind: start, resume, saved, save_failed, skipped_step, stop_requested, stopped, exception, death, hang,
            straggler, restart, crash_loop, locked or end.
        text: for a person, without the kind.
        more: further values, or other ones for `rank`, `attempt` and `step` (-1: none of them).
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
    """The events of a run, in the order of their times; empty without any."""
    try:
        lines = (Path(run_dir) / EVENTS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and isinstance(event.get("time"), (int, float)) and "kind" in event:
            found.append(event)
    return sorted(found, key=lambda event: float(event["time"]))


def _number(variable: str, without: int) -> int:
    try:
        return int(os.environ.get(variable, without))
    except ValueError:
        return without
