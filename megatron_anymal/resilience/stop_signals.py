"""Stop on request: a signal to any rank, or the time limit, stops all ranks after the same step.

A signal only sets a flag. Each training step and each validation batch sums the flags of all ranks along with its
losses, so all ranks see the request at the same point.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Optional

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Possible reasons to stop, in the order of `stop_flags`.
REASONS = ("SIGTERM", "SIGUSR1", "exp_manager.max_time_per_run")

_caught: set[int] = set()
_deadline: Optional[float] = None
_active = False


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Treat SIGTERM and SIGUSR1 as stop requests while the block runs. Nested uses have no effect."""
    global _active, _deadline
    if _active or threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.signal(number, _note) for number in SIGNALS}
    _active = True
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _caught.clear()
        _active, _deadline = False, None


def stop_after(seconds: Optional[float]) -> None:
    """Request a stop after the given number of seconds; None means never."""
    global _deadline
    _deadline = None if seconds is None else time.monotonic() + seconds


def stop_flags() -> list[float]:
    """1.0 for each of REASONS for which this rank is to stop, else 0.0."""
    late = _deadline is not None and time.monotonic() >= _deadline
    return [*(float(number in _caught) for number in SIGNALS), float(late)]


def agreed(sums: Sequence[float]) -> str:
    """Reasons to stop, from the sums of all ranks' stop flags; empty if the run continues."""
    return " and ".join(reason for reason, count in zip(REASONS, sums) if count)


def _note(number: int, frame: Optional[FrameType]) -> None:
    _caught.add(number)
