"""What a process leaves behind when it fails: an event with the traceback; and its end, which waits for nothing."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from megatron_anymal.resilience.events import record
from megatron_anymal.resilience.exit_codes import Exit, code_of

_told: list[BaseException] = []


def record_failure(run_dir: Path, error: BaseException, step: int = -1) -> None:
    """Add an exception to the run's events, once; not where there is no run folder yet."""
    if any(error is told for told in _told) or not run_dir.is_dir():
        return
    _told.append(error)
    code = code_of(error)
    kind = "locked" if code is Exit.LOCKED else "exception"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    lines = "".join(traceback.format_exception(error))
    record(run_dir, kind, text, step=step, exit_code=int(code), traceback=lines)


def exit_now(code: int) -> NoReturn:
    """End the process at once: the destructors of process groups would wait for ranks that are gone."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # The reader of a pipe has left.
            continue
    os._exit(code)
