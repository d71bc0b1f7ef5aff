"""Record a process's failure as an event with its traceback; exit without waiting for other ranks."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megatron_anymal.resilience.events import record
from megatron_anymal.resilience.exit_codes import Exit, code_of

_recorded: list[BaseException] = []


def record_failure(run_dir: Path, error: BaseException, step: int = -1) -> None:
    """Add an exception to the run's events, once; do nothing if the run folder does not exist yet."""
    if any(error is recorded for recorded in _recorded) or not run_dir.is_dir():
        return
    _recorded.append(error)
    code = code_of(error)
    kind = "locked" if code is Exit.LOCKED else "exception"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    lines = "".join(traceback.format_exception(error))
    record(run_dir, kind, text, step=step, exit_code=int(code), traceback=lines)


def forget_failures() -> None:
    """Let go of the exceptions that were recorded, and of what their tracebacks hold."""
    _recorded.clear()


def exit_after_cleanup(code: int) -> NoReturn:
    """Exit the process as the interpreter does, except that it is not torn down.

    Threads are waited for, exit handlers run and open files are flushed, but modules are not destroyed, which takes up
    to a second of processor time once torch and megatron-core are imported.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for thing in gc.get_objects():
        # Exact types: others may do anything when they are asked for their class.
        if type(thing) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
            with suppress(OSError, ValueError):
                thing.flush()
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """Exit the process at once; destructors of process groups would wait for ranks that are gone."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # The reader of a pipe may be gone.
            continue
    os._exit(code)
