"""Stop requests that the user or the scheduler sends to a launcher as signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Optional

# Forwarded to the ranks, which stop with a checkpoint; Ctrl-C and the loss of the terminal are forwarded as SIGTERM.
_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A second Ctrl-C within this many seconds is taken for an accidental repeat.
_TWICE = 0.5


class Stopped(Exception):
    """A stop was requested while no rank was running."""


class StopRequests:
    """Stop requests received so far."""

    def __init__(self) -> None:
        # Signal to forward to the ranks; None if no stop was requested.
        self.stop: Optional[signal.Signals] = None
        # Whether to end at once, without a checkpoint.
        self.now = False
        self._interrupted = 0.0

    def check(self) -> None:
        """Raise Stopped if a stop was requested."""
        if self.stop is not None:
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Wait; raise Stopped as soon as a stop is requested."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(0.1, left))
        self.check()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Treat signals as stop requests while the block runs. Must be called in the main thread."""
        # Under nohup, the loss of the terminal is ignored.
        stopping = [n for n in _STOPPING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before: dict[int, Any] = {number: signal.signal(number, self._note) for number in stopping}
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
