"""The process between a launcher and its ranks, for one attempt: torchrun's elastic agent, or nvidia-resiliency-ext's.

A process of its own: the launcher stays small and outlives whatever happens here. It tells the launcher which ranks
it started and how each ended, as soon as it does: FOLDER/started_RANK holds the process number, FOLDER/exit_PID the
exit code, or minus the signal's number. It ends its ranks where the launcher is gone. Signals that ask a run to stop
are the launcher's to pass on: the agent would end the ranks.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Optional

import psutil

from megatron_anymal.resilience.exit_codes import Exit
from megatron_anymal.resilience.failure_record import exit_now

MODULES = {"torchrun": "torch.distributed.run", "ft": "nvidia_resiliency_ext.fault_tolerance.launcher"}
# What the agent itself failed with, in the launcher's folder.
ERROR = "agent_error"
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Seconds between looks for the launcher.
_LOOK = 0.05


def exit_code(folder: Path, pid: int) -> Optional[int]:
    """How a rank ended: its exit code, or minus the signal's number; None while it runs or where it was not seen."""
    with suppress(OSError, ValueError):
        return int((folder / f"exit_{pid}").read_text())
    return None


def ranks_started(folder: Path) -> dict[int, int]:
    """Rank -> process number, of all ranks that the agent of a folder has started, those that have ended too."""
    found = {}
    for path in folder.glob("started_*"):
        with suppress(OSError, ValueError):
            found[int(path.name.removeprefix("started_"))] = int(path.read_text())
    return found


def ranks_below(pid: int) -> dict[int, int]:
    """Rank -> process number, of an agent's children that have a rank and run."""
    found = {}
    for child in _children(pid):
        # Between its fork and the start of its program a child still has the agent's environment, without a rank.
        with suppress(OSError, ValueError):
            for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry.removeprefix(b"RANK="))] = child
    return found


def _children(pid: int) -> list[int]:
    """A process's children, without a look at all processes of the machine where the kernel lists them."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        # A thread that ended meanwhile.
        lists = []
    if lists:
        return [int(child) for listed in lists for child in listed.split()]
    with suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def end_rank(pid: int) -> None:
    """End a rank and what it started, at once: each rank leads a process group."""
    for end in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """Run one attempt.

    Args:
        arguments: which agent, the launcher's folder, the folder for logs, then the agent's own arguments.
    """
    launcher, folder, logs, *rest = arguments
    # Before an agent takes it.
    _Spawned.folder = Path(folder)
    subprocess.Popen = _Spawned  # type: ignore[misc]
    for number in _STOPPING:
        # A handler, unlike SIG_IGN, is not handed on to the ranks.
        signal.signal(number, _leave_it)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_failure)
    module = importlib.import_module(MODULES[launcher])
    options = module.parse_args(rest)
    config, command, command_arguments = module.config_from_args(options)
    config.logs_specs = RankLogs(Path(logs))
    # Never all of _STOPPING, whatever the user's shell says.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle = "SIGQUIT"
    try:
        module.elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except Exception as error:
        # ChildFailedError; each agent has a class of that name of its own.
        failures = getattr(error, "failures", None)
        if failures is None:
            _write(Path(folder) / ERROR, f"{type(error).__name__}: {error}")
            traceback.print_exc()
            return 1
        for failure in failures.values():
            if exit_code(Path(folder), failure.pid) is None:
                _write(Path(folder) / f"exit_{failure.pid}", str(failure.exitcode))
        return 1
    return 0


class RankLogs:
    """What ranks print: to rank_00003.out and rank_00003.err, and to the console.

    Stands in for torch.distributed.elastic.multiprocessing.LogsSpecs.
    """

    def __init__(self, folder: Path) -> None:
        self.root_log_dir = str(folder)

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> Any:
        """Local rank -> files, as an agent takes them."""
        from torch.distributed.elastic.multiprocessing.api import LogsDest

        folder = Path(self.root_log_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"warning: no logs of the ranks: {error}. They print to the console only.", file=sys.stderr)
            nothing = dict.fromkeys(envs, "")
            return LogsDest(nothing, nothing, {}, {}, nothing)
        out = {local: self.file(env["RANK"], "out") for local, env in envs.items()}
        err = {local: self.file(env["RANK"], "err") for local, env in envs.items()}
        return LogsDest(out, err, dict(out), dict(err), dict.fromkeys(envs, os.devnull))

    def file(self, rank: str, stream: str) -> str:
        """Where a rank's `out` or `err` goes."""
        return f"{self.root_log_dir}/rank_{int(rank):05d}.{stream}"


def _watch(launcher: int) -> None:
    """End every rank where the launcher is gone."""
    while os.getppid() == launcher:
        time.sleep(_LOOK)
    for pid in {*_Spawned.ranks, *ranks_below(os.getpid()).values()}:
        end_rank(pid)
    os._exit(1)


class _Spawned(subprocess.Popen):
    """A child of the agent. A rank is noted as it starts: one that ends at once is seen by no later look."""

    folder: ClassVar[Path]
    # Process number -> a rank's process; how it ended can be asked for also where the agent itself saw it first.
    ranks: ClassVar[dict[int, subprocess.Popen[Any]]] = {}

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        rank = (settings.get("env") or {}).get("RANK")
        if rank is not None:
            self.ranks[self.pid] = self
            _write(self.folder / f"started_{rank}", str(self.pid))
            threading.Thread(target=_note_end, args=(self.folder, self.pid), daemon=True).start()


def _note_end(folder: Path, pid: int) -> None:
    code: Optional[int] = None
    try:
        # WNOWAIT: the agent still finds it.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if ended is not None:
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    except ChildProcessError:
        # The agent was quicker: it knows, or will in a moment. Without its word the launcher would take it for a crash.
        deadline = time.monotonic() + 1.0
        while code is None and time.monotonic() < deadline:
            code = _Spawned.ranks[pid].returncode
            time.sleep(0.01)
    if code is not None:
        _write(folder / f"exit_{pid}", str(code))


def _write(path: Path, text: str) -> None:
    # The folder goes with the attempt.
    with suppress(OSError):
        part = path.with_name(f".{path.name}.{threading.get_ident()}")
        part.write_text(text)
        part.replace(path)


def _is_failure(record: logging.LogRecord) -> bool:
    """Whether a message of torchrun's is shown: it calls each exit code but 0 a failure, a stop on request too."""
    return not record.getMessage().startswith(f"failed (exitcode: {int(Exit.REQUEUE)})")


def _leave_it(number: int, frame: Optional[FrameType]) -> None:
    """Do nothing."""


if __name__ == "__main__":
    exit_now(main(sys.argv[1:]))
