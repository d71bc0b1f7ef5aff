"""A library that starts a thread some time after it was imported."""

import signal
import threading
import time
from types import FrameType
from typing import Optional


def start(number: int, frame: Optional[FrameType]) -> None:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


signal.signal(signal.SIGALRM, start)
signal.setitimer(signal.ITIMER_REAL, 0.5)
