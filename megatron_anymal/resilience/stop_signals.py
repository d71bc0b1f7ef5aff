"""Stopping on request: a signal at any rank, or the time limit, stops all ranks after the same step.

A signal only raises a flag. Each training step and each validation batch adds up the flags of all ranks in the
reduction of its losses, so all learn of it in the same place.
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
# What asks for a stop, in the order of `stop_flags`.
REASONS = ("SIGTERM", "SIGUSR1", "exp_manager.max_time_per_run")

_caught: set[int] = set()
_deadline: Optional[float] = None
_active = False


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Take SIGTERM and SIGUSR1 for wishes to stop while the block runs. Within such a block it changes nothing."""
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
    """Wish to stop so many seconds from now; None: never."""
    global _deadline
    _deadline = None if seconds is None else time.monotonic() + seconds


def stop_flags() -> list[float]:
    """1.0 for each of REASONS that asks this rank to stop, else 0.0."""
    late = _deadline is not None and time.monotonic() >= _deadline
    return [*(float(number in _caught) for number in SIGNALS), float(late)]


def agreed(sums: Sequence[float]) -> str:
    """Why to stop, from the wishes of all ranks added up; empty: go on."""
    return " and ".join(reason for reason, count in zip(REASONS, sums) if count)


def _note(number: int, frame: Optional[FrameType]) -> None:
    _caught.add(number)
