"""Process between a launcher and its ranks for one attempt: torchrun's or nvidia-resiliency-ext's elastic agent.

It is a separate process, so that the launcher stays small and survives any failure in it. It reports the start and end
of each rank to the launcher at once: FOLDER/started_RANK holds the process ID, FOLDER/exit_PID the exit code or the
negative signal number. It ends its ranks if the launcher is gone. Stop signals are ignored here, because the elastic
agent would end the ranks; the launcher forwards them.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Optional, Union

from megatron_anymal.launcher.standby import SOCKET, Forked, fork
from megatron_anymal.launcher.survivors import socket_for
from megatron_anymal.processes.child_processes import children, end_group, leave_stop_signals
from megatron_anymal.resilience.exit_codes import Exit
from megatron_anymal.resilience.failure_record import exit_now

MODULES = {"torchrun": "torch.distributed.run", "ft": "nvidia_resiliency_ext.fault_tolerance.launcher"}
# File in the launcher's folder with the error of a failed agent.
ERROR = "agent_error"
# Polling interval for the launcher, in seconds.
_LOOK = 0.05


def exit_code(folder: Path, pid: int) -> Optional[int]:
    """Exit code of a rank, or its negative signal number; None if it is still running or its end was not seen."""
    with suppress(OSError, ValueError):
        return int((folder / f"exit_{pid}").read_text())
    return None


def ranks_started(folder: Path) -> dict[int, int]:
    """Rank -> process ID of all ranks that the agent of a folder has started, including those that have ended."""
    pids = {}
    for path in folder.glob("started_*"):
        with suppress(OSError, ValueError):
            pids[int(path.name.removeprefix("started_"))] = int(path.read_text())
    return pids


def ranks_below(pid: int) -> dict[int, int]:
    """Rank -> process ID of an agent's running children that have a rank."""
    pids = {}
    for child in children(pid):
        # Between fork and exec, a child still has the agent's environment, without a rank.
        with suppress(OSError, ValueError):
            for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    pids[int(entry.removeprefix(b"RANK="))] = child
    return pids


def main(arguments: Sequence[str]) -> int:
    """Run one attempt.

    Args:
        arguments: name of the agent, the launcher's folder, the log folder, then the agent's own arguments.
    """
    launcher, folder, logs, *rest = arguments
    _Spawned.folder = Path(folder)
    _replace_popen()
    leave_stop_signals()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_failure)
    # nvidia-resiliency-ext's processes that watch ranks would outlive this one; the launcher finds hangs itself.
    os.environ["NVRX_DISABLE_RANK_MONITORS"] = "1"
    module = importlib.import_module(MODULES[launcher])
    _configure(module, Path(logs))
    try:
        # Not only `elastic_launch`: an agent may have a rendezvous of its own to prepare.
        module.run(module.parse_args(rest))
    except Exception as error:
        # ChildFailedError, of which each agent has its own class.
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


def _configure(module: Any, logs: Path) -> None:
    """Have an agent's module send the ranks' output to our files, and leave stop signals to the launcher."""
    original = module.config_from_args

    def config_from_args(*arguments: Any) -> tuple[Any, Any, Any]:
        config, command, command_arguments = original(*arguments)
        config.logs_specs = RankLogs(logs)
        # The agent must not handle stop signals, even if the user's environment asks for it.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle = "SIGQUIT"
        return config, command, command_arguments

    module.config_from_args = config_from_args


class RankLogs:
    """Sends the output of ranks to files such as rank_00003.out and rank_00003.err, and to the console.

    Replaces torch.distributed.elastic.multiprocessing.LogsSpecs.
    """

    def __init__(self, folder: Path) -> None:
        self.root_log_dir = str(folder)

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> Any:
        """Log destinations of each local rank, in the form that agents expect."""
        from torch.distributed.elastic.multiprocessing.api import LogsDest

        folder = Path(self.root_log_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"warning: no log files for the ranks: {error}. They print to the console only.", file=sys.stderr)
            nothing = dict.fromkeys(envs, "")
            return LogsDest(nothing, nothing, {}, {}, nothing)
        out = {local: self.file(env["RANK"], "out") for local, env in envs.items()}
        err = {local: self.file(env["RANK"], "err") for local, env in envs.items()}
        return LogsDest(out, err, dict(out), dict(err), dict.fromkeys(envs, os.devnull))

    def file(self, rank: str, stream: str) -> str:
        """Path of a rank's log file; `stream` is `out` or `err`."""
        return f"{self.root_log_dir}/rank_{int(rank):05d}.{stream}"


def _replace_popen() -> None:
    """Have agents start `_Spawned`, also those that the standby process had imported before."""
    original = subprocess.Popen
    for module in list(sys.modules.values()):
        if vars(module).get("Popen") is original:
            module.Popen = _Spawned  # type: ignore[attr-defined]


def _watch(launcher: int) -> None:
    """End every rank once the launcher is gone."""
    while os.getppid() == launcher:
        time.sleep(_LOOK)
    for pid in {*_Spawned.ranks, *ranks_below(os.getpid()).values()}:
        end_group(pid)
    os._exit(1)


class _Rank(Forked):
    """A forked rank, as its agent sees it."""

    def poll(self) -> Optional[int]:
        """Exit code; None while it runs. Also None if it was killed or crashed, because the agent would then end the
        other ranks; the launcher decides whether to end or keep them."""
        code = super().poll()
        return None if code is not None and (code < 0 or code == Exit.CRASH) else code


class _Spawned(subprocess.Popen):
    """Child process of the agent. A rank is recorded as it starts, since polling would miss one that ends at once.

    A rank that the standby process can fork is not a child and gets a `Forked` instead.
    """

    folder: ClassVar[Path]
    # Process ID -> process of a rank; holds the exit code even if the agent collected it first.
    ranks: ClassVar[dict[int, Union[subprocess.Popen[Any], Forked]]] = {}

    def __new__(cls, *arguments: Any, **settings: Any) -> Any:
        environment = settings.get("env") or {}
        path, words = os.environ.get(SOCKET), list(settings.get("args") or (arguments[0] if arguments else []))
        if path and "RANK" in environment and words[:3] == [sys.executable, "-u", "-m"]:
            streams = enumerate((settings.get("stdout"), settings.get("stderr")), start=1)
            output = [file.fileno() if file else number for number, file in streams]
            # First the process that had this rank before, if it waits.
            sockets = [socket for socket in (socket_for(environment), path) if socket]
            begun = (fork(str(socket), words[3], words[4:], environment, cls.folder, output) for socket in sockets)
            forked = next((one for one in begun if one is not None), None)
            if forked is not None:
                forked.__class__ = _Rank
                cls.ranks[forked.pid] = forked
                _write(cls.folder / f"started_{environment['RANK']}", str(forked.pid))
                return forked
        return super().__new__(cls)

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
        # WNOWAIT leaves the exit status for the agent to collect.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if ended is not None:
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    except ChildProcessError:
        # The agent was faster and has the code, or will in a moment. Without it the launcher would assume a crash.
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
    """Log filter that hides torchrun's failure message for a stop on request, which it reports as a failure."""
    return not record.getMessage().startswith(f"failed (exitcode: {int(Exit.REQUEUE)})")


if __name__ == "__main__":
    exit_now(main(sys.argv[1:]))
