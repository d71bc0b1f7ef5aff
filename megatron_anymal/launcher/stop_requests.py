"""What the user or the scheduler asks a launcher for, by signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Optional

# Passed on to the ranks, which stop with a checkpoint; Ctrl-C goes to them as a SIGTERM.
_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds after which a second Ctrl-C is not taken for the first one pressed twice.
_TWICE = 0.5


class Stopped(Exception):
    """A wish to stop came while nothing ran."""


class StopRequests:
    """Signals that came."""

    def __init__(self) -> None:
        # What to pass on to the ranks; None: nothing.
        self.stop: Optional[signal.Signals] = None
        # End at once, without a checkpoint.
        self.now = False
        self._interrupted = 0.0

    def check(self) -> None:
        """Raise Stopped where a stop is wished for."""
        if self.stop is not None:
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Wait; raise Stopped as soon as a stop is wished for."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(0.1, left))
        self.check()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Take signals for stop_requests while the block runs; in the main thread."""
        before: dict[int, Any] = {number: signal.signal(number, self._note) for number in _STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted and now - self._interrupted > _TWICE:
                self.now = True
            self._interrupted = self._interrupted or now
        if self.stop is None:
            self.stop = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
