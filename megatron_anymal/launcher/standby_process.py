"""The standby process: imports what a rank imports, then forks a process for each request (standby.py).

It also holds the configuration that its launcher has composed, so that no rank composes it again.

A fork is safe as long as this process has one thread and has not used a GPU: both are checked before each one, and the
request is declined otherwise. It ends with its launcher, and the processes that it forked end with it.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from megatron_anymal import lean_imports
from megatron_anymal.config import composed_ahead
from megatron_anymal.launcher.standby import COMPOSED, UNSAFE, Request, become, listen, receive
from megatron_anymal.log_filters import quiet_libraries
from megatron_anymal.processes.child_processes import end_with, leave_stop_signals


def main(arguments: Sequence[str]) -> int:
    """Import everything, then serve until the launcher ends; in a forked process, run what was requested.

    Args:
        arguments: process ID of the launcher, path of the socket to create, then the modules to import.
    """
    launcher, path, *modules = arguments
    end_with(int(launcher))
    inherited = leave_stop_signals()
    quiet_libraries()
    lean_imports.install()
    for module in modules:
        # A module that is missing is reported by the rank that needs it.
        with suppress(ImportError):
            importlib.import_module(module)
    if exported := Path(path).with_name(COMPOSED).read_bytes():
        composed_ahead.adopt(exported)
    if reason := _why_not():
        print(f"no standby process: {reason}. The ranks are started anew.", file=sys.stderr, flush=True)
        return UNSAFE
    # Pages that are never written stay shared; a collection would write to all of them.
    gc.collect()
    lean_imports.freeze()
    request = _Server(path, inherited).run()
    # As `python -m` does.
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    return 0


class _Server:
    """Serves requests and notes the ends of the processes that were forked.

    Args:
        path: path of the socket to create.
        handlers: signal -> handler that forked processes begin with.
    """

    def __init__(self, path: str, handlers: Mapping[int, Any]) -> None:
        self._handlers = {**handlers, signal.SIGCHLD: signal.SIG_DFL}
        # Process ID -> file to note its end in.
        self._notes: dict[int, Path] = {}
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)
        # A handler, since an ignored signal wakes nothing.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._listener = listen(Path(path))

    def run(self) -> Request:
        """Serve for ever. Returns only in a forked process: its request."""
        while True:
            ready, _, _ = select.select([self._listener, self._woken], [], [], 1.0)
            if self._woken in ready:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
            self._note_ends()
            if self._listener in ready and (request := self._serve()):
                return request

    def _note_ends(self) -> None:
        while self._notes:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            path = self._notes.pop(pid)
            # The folder goes with the attempt.
            with suppress(OSError):
                part = path.with_name(f".{path.name}.standby")
                part.write_text(str(os.waitstatus_to_exitcode(status)))
                part.replace(path)

    def _serve(self) -> Optional[Request]:
        """Answer one request; returns it in the process that was forked for it."""
        connection, _ = self._listener.accept()
        with connection:
            request, files = receive(connection)
            try:
                if request.pid == 0 and (reason := _why_not()):
                    # The terminal may be gone.
                    with suppress(OSError):
                        print(f"the standby process declined to fork: {reason}", file=sys.stderr, flush=True)
                    return None
                standby, pid = os.getpid(), request.pid or os.fork()
                if pid == 0:
                    self._leave(standby, request, files)
                    return request
                self._notes[pid] = Path(request.note) / f"exit_{pid}"
                # The process may have ended, and its launcher with it.
                with suppress(OSError):
                    connection.send(str(pid).encode())
                return None
            finally:
                for file in files:
                    os.close(file)

    def _leave(self, standby: int, request: Request, files: Sequence[int]) -> None:
        """In a forked process: become what was requested, in a session of its own."""
        end_with(standby)
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.setsid()
        for opened in (self._listener, self._woken, self._wake):
            opened.close()
        become(request, files)
        _seed()


def _seed() -> None:
    """Draw new random states, as a new interpreter has them; Python's own is drawn by os.fork."""
    import numpy as np

    np.random.seed()


def _why_not() -> str:
    """Why a fork would not be safe; empty if it is."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"it has {threads} threads"
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if os.readlink(file).startswith("/dev/nvidia"):
                return "a library that it imported uses the GPU"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
