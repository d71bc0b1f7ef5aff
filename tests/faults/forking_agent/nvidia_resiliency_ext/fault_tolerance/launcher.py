"""Replacement for the elastic agent on one node that forks its ranks, so that NeMo is imported only once.

Each rank is in its own process group and runs the real command. On two cores, four ranks start in a third of the time.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from megatron_anymal.__main__ import command
from megatron_anymal.log_filters import quiet_libraries

# Modules that a run imports after its start.
_MODULES = (
    "nemo.core.config",
    "nemo.utils.exp_manager",
    "lightning.pytorch",
    "megatron_anymal.nemo.entry",
    "megatron_anymal.nemo.model",
    "megatron_anymal.train.build",
)
# A variable of the agent's environment that no rank needs. A rank's RANK is written over it.
_PLACE = b"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="


class ChildFailedError(Exception):
    def __init__(self, failures: dict[int, SimpleNamespace]) -> None:
        self.failures = failures


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("nnodes", "nproc-per-node", "max-restarts", "monitor-interval"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("rdzv-backend", "rdzv-id", "rdzv-endpoint", "local-addr", "ft-log-level"):
        parser.add_argument(f"--{name}")
    parser.add_argument("-m", dest="module")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def config_from_args(options: argparse.Namespace) -> tuple[SimpleNamespace, str, list[str]]:
    return SimpleNamespace(processes=int(options.nproc_per_node)), sys.executable, options.program


def elastic_launch(config: SimpleNamespace, entrypoint: str) -> Callable[..., None]:
    def launch(*arguments: str) -> None:
        quiet_libraries()
        for name in _MODULES:
            importlib.import_module(name)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        ranks = [_fork(rank, port, config, list(arguments)) for rank in range(config.processes)]
        ended: dict[int, int] = {}
        while len(ended) < len(ranks) and not any(ended.values()):
            time.sleep(0.1)
            ended |= {pid: code for pid in ranks if pid not in ended and (code := _ended(pid)) is not None}
        if any(ended.values()):
            while len(ended) < len(ranks):
                time.sleep(0.1)
                ended |= {pid: code for pid in ranks if pid not in ended and (code := _ended(pid)) is not None}
            failed = [SimpleNamespace(pid=pid, exitcode=ended[pid]) for pid in ranks if ended[pid]]
            raise ChildFailedError(dict(enumerate(failed)))

    return launch


def _ended(pid: int) -> int | None:
    # WNOWAIT leaves the exit status for the agent's own watcher.
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _check_threads() -> None:
    """Check that the agent has no threads other than Python threads.

    Its Python threads (which watch for the end of the ranks) hold no lock but the GIL, which a fork reinitializes. With
    a library's thread pool, a forked child could deadlock.
    """
    threads = len(os.listdir("/proc/self/task"))
    if threads > threading.active_count():
        raise RuntimeError(f"a library has {threads - threading.active_count()} threads in the agent that forks ranks")


def _fork(rank: int, port: int, config: SimpleNamespace, arguments: list[str]) -> int:
    _check_threads()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        _show_rank(rank)
        for number in range(1, signal.NSIG):
            if callable(signal.getsignal(number)) and number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(config.logs_specs.file(str(rank), name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(config.processes),
            LOCAL_WORLD_SIZE=str(config.processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        sys.argv = ["anymal", *arguments]
        command()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _show_rank(rank: int) -> None:
    """Make /proc show RANK in this process's environment, as for a program that was started with it."""
    shown = Path("/proc/self/environ").read_bytes()
    # Fields after the parenthesised name. Field 50 of the file is the start of the environment.
    begin = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47])
    text = b"RANK=%d\0" % rank
    ctypes.memmove(begin + shown.index(_PLACE), text, len(text))
