"""A rank that stays when another one is killed: it leaves the broken job and waits to be a rank of the next attempt.

It runs its program again from the beginning, so that everything is checked, composed and restored as in a new process.
What it saves is what the process has: its imports, the caches of its libraries, and the frozen weights
(model/kept_weights.py). The launcher's side is in survivors.py.

A process stays only if it has failed because a peer was lost, and only if nothing of the attempt is left in it: no
thread, no child process, no process group. Otherwise it ends, and is forked anew.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Optional

from megatron_anymal.launcher import standby, survivors
from megatron_anymal.processes.child_processes import children
from megatron_anymal.resilience import survival
from megatron_anymal.resilience.events import ATTEMPT
from megatron_anymal.resilience.exit_codes import Exit, code_of
from megatron_anymal.resilience.failure_record import forget_failures

# Seconds to wait for the launcher's invitation, and for what is left of the attempt to end.
_INVITED, _CLEARED = 1.5, 0.5
_LOOK = 0.01
# Texts of gloo's errors about a lost peer, which have no class of their own.
_GLOO = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


def rejoin(error: BaseException) -> bool:
    """Leave the job that failed with this exception and wait for the next attempt.

    Returns:
        True in a rank of the next attempt, with its environment, output and sys.argv: run the program again. False if
        the process is to end: another cause, no invitation, or something of the attempt is left in it.
    """
    folder, errors = Path(os.environ[survival.ENVIRONMENT]), _with_causes(error)
    if code_of(error) != Exit.CRASH or not _lost_a_peer(errors) or not _invited(folder):
        return False
    handled = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    # Ignore the stop signals that the launcher forwards: they are meant for ranks that train.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in handled}
    _leave(errors)
    if left := _left_behind():
        text = f"cannot stay for the next attempt, because something from this one is left: {left}"
        print(text, file=sys.stderr, flush=True)
        return False
    _wait(folder)
    for number, handler in before.items():
        signal.signal(number, handler)
    return True


def _with_causes(error: BaseException) -> list[BaseException]:
    """An exception and all that led to it."""
    chain: list[BaseException] = []
    left: list[Optional[BaseException]] = [error]
    while left:
        one = left.pop()
        if one is not None and one not in chain:
            chain.append(one)
            left += [one.__cause__, one.__context__]
    return chain


def _lost_a_peer(errors: Sequence[BaseException]) -> bool:
    """Whether one of these exceptions is the loss of another process of the job."""
    import torch.distributed as dist

    if not dist.is_initialized() or "nccl" in dist.get_backend():
        # A GPU may still wait for the lost peer, within a kernel.
        return False
    return any(
        isinstance(one, dist.DistError) or (isinstance(one, RuntimeError) and any(text in str(one) for text in _GLOO))
        for one in errors
    )


def _invited(folder: Path) -> bool:
    path = survival.invitation(folder, int(os.environ[ATTEMPT]))
    deadline = time.monotonic() + _INVITED
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK)
    return True


def _leave(errors: Sequence[BaseException]) -> None:
    """Leave the job, and release everything that the program has built."""
    from megatron_anymal.parallel import shutdown

    # Frames hold the models, the loaders and the process groups.
    for error in errors:
        error.__traceback__ = None
    forget_failures()
    shutdown()
    gc.collect()


def _left_behind() -> str:
    """What is still there of the attempt; empty if nothing is."""
    deadline = time.monotonic() + _CLEARED
    while True:
        left = {
            "threads": [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()],
            "child processes": children(os.getpid()),
            # A model that could not be collected refers to process groups, and keeps their peers waiting.
            "threads of gloo's process groups": gloo_threads(),
        }
        if not any(left.values()):
            return ""
        if time.monotonic() > deadline:
            return ", ".join(f"{name}: {names}" for name, names in left.items() if names)
        time.sleep(_LOOK)


def gloo_threads() -> int:
    """Number of this process's threads that belong to process groups."""
    count = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        # It may end meanwhile.
        with suppress(OSError):
            count += path.read_text().startswith("pt_gloo")
    return count


def _wait(folder: Path) -> None:
    """Wait for the agent of the next attempt and become its rank. The launcher ends a process that no agent claims."""
    path = survivors.socket_of(folder, int(os.environ["RANK"]), os.getpid())
    with standby.listen(path) as listening:
        connection, _ = listening.accept()
    path.unlink(missing_ok=True)
    with connection:
        request, files = standby.receive(connection)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        standby.become(request, files)
        for file in files:
            os.close(file)
        # The standby process, whose child this is, notes its end.
        standby.send(os.environ[standby.SOCKET], replace(request, pid=os.getpid()), [])
        connection.send(str(os.getpid()).encode())
