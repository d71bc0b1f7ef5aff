"""One attempt at a run on one node: start the agent, monitor the ranks, end them all if one dies or hangs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Optional

from megatron_anymal.launcher import agent as agents
from megatron_anymal.launcher.hang_detector import (
    RankView,
    catches,
    diagnose,
    dump_stacks,
    hanging,
    look,
    process_state,
)
from megatron_anymal.launcher.job import Ending, Job, attempt_folder
from megatron_anymal.launcher.rendezvous import SingleNode
from megatron_anymal.launcher.standby import SOCKET, Forked, Standby, fork
from megatron_anymal.launcher.stop_requests import StopRequests
from megatron_anymal.launcher.survivors import Survivors
from megatron_anymal.processes.child_processes import end_group
from megatron_anymal.resilience import heartbeat, survival
from megatron_anymal.resilience.events import ATTEMPT, read, record
from megatron_anymal.resilience.exit_codes import Exit

GRACE = "ANYMAL_GRACE_SECONDS"
# Polling interval for the ranks, in seconds.
_LOOK = 0.2
# The same while surviving ranks gather for the next attempt.
_LOOK_GATHERING = 0.02
# A longer pause between two looks, in seconds, means that the launcher was suspended, and its ranks probably too.
_SUSPENDED = 5.0
# Seconds the other ranks get before they are killed: to report what they saw after one has failed, to reach the same
# verdict after one has ended with an exit code that all ranks agree on, and to shut down after one has stopped cleanly.
_LAST_WORDS, _AGREEING, _STOPPING = 3.0, 8.0, 60.0
# The same after one was killed by a signal, which no other rank can have caused; and seconds that survivors get to
# leave the job.
_AFTER_A_KILL, _LEAVING = 1.0, 2.0
# Seconds the agent may take to report how a rank ended, and to exit once its ranks are gone.
_AGENT = 5.0
# Seconds for the agent to copy the last lines of a rank that crashed to the console, which it does ten times a second.
_ECHO = 0.25
# Seconds an agent waits for its ranks before it kills them: longer than all of the above.
_AGENT_PATIENCE = 120
# Lines of a rank's standard error to record with its death.
_LINES = 15
# The list of loaded libraries after a crash is one line of thousands of characters.
_WIDTH = 300


def rank_environment(job: Job) -> dict[str, str]:
    """Environment variables of the agent and the ranks that are the same in every attempt."""
    environment = {
        "PYTHONUNBUFFERED": "1",
        # torchrun would set the same, but with a warning.
        **({"OMP_NUM_THREADS": "1"} if job.processes > 1 else {}),
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
        **os.environ,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_AGENT_PATIENCE),
    }
    if job.grace_seconds is not None:
        environment[GRACE] = f"{job.grace_seconds:g}"
    # Processes with RANK in their environment are taken for ranks.
    environment.pop("RANK", None)
    return environment


class Attempt:
    """One attempt at a run on this node.

    Args:
        number: number of the attempt, counted over all jobs of the run.
        stop_requests: stop requests of the user or the scheduler.
        say: prints a message to the user.
        standby: forks the agent and the ranks; None: they are started anew.
        variables: environment variables of the ranks of this attempt.
        survivors: ranks that may stay for the next attempt; None: none may.
    """

    def __init__(
        self,
        job: Job,
        number: int,
        rendezvous: SingleNode,
        stop_requests: StopRequests,
        say: Callable[[str], None],
        standby: Optional[Standby] = None,
        variables: Optional[Mapping[str, str]] = None,
        survivors: Optional[Survivors] = None,
    ) -> None:
        self.job, self.number, self.rendezvous, self.stop_requests = job, number, rendezvous, stop_requests
        self.say, self.standby, self.variables, self.survivors = say, standby, dict(variables or {}), survivors
        self.logs = attempt_folder(job.run_dir, number)
        # All ranks seen so far: rank -> process ID, and rank -> time when it was first seen.
        self.workers: dict[int, int] = {}
        self.begun: dict[int, float] = {}
        # Rank -> exit code or negative signal number of ranks that failed by themselves, in order.
        self.failures: dict[int, int] = {}
        self.hang: Optional[str] = None
        self.step = -1
        # When to kill all ranks; None means never.
        self.kill_at: Optional[float] = None
        self.gone: dict[int, float] = {}
        # The ranks have been asked to stay; rank -> process ID of those that do.
        self.invited = False
        self.staying: dict[int, int] = {}
        # No rank counts as hanging until then.
        self.patient_until = 0.0
        self.signalled: set[tuple[int, int]] = set()

    def run(self) -> Ending:
        """Run until no process of the attempt is left."""
        self.folder = Path(tempfile.mkdtemp(prefix="anymal_"))
        self.agent = self._start()
        try:
            while self.agent.poll() is None:
                self._sleep()
                self._find_ranks()
                self._pass_on()
                self._look()
                self._gather()
                if self.kill_at is not None and time.monotonic() >= self.kill_at:
                    self._kill()
            self._find_ranks()
            self._note_failures()
            self._note_steps()
            return self._ending()
        finally:
            self._kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _sleep(self) -> None:
        begun = time.monotonic()
        time.sleep(_LOOK_GATHERING if self.invited else _LOOK)
        if (now := time.monotonic()) - begun > _SUSPENDED:
            self.patient_until = now + self.job.limits.hang_timeout

    def _start(self) -> subprocess.Popen[bytes] | Forked:
        job = self.job
        arguments = [
            *(f"--nnodes={job.nodes}", f"--nproc-per-node={job.processes}", "--max-restarts=0"),
            *("--rdzv-backend=c10d", f"--rdzv-id={job.identity}_{self.number}", *self.rendezvous.agent_arguments),
            *("--monitor-interval=0.5", *(["--ft-log-level=WARNING"] if job.launcher == "ft" else [])),
            *job.program,
        ]
        environment = {
            **rank_environment(job),
            heartbeat.ENVIRONMENT: str(self.folder),
            ATTEMPT: str(self.number),
            **self.variables,
        }
        words = [job.launcher, str(self.folder), str(self.logs), *arguments]
        if self.standby is not None:
            environment[SOCKET] = str(self.standby.socket)
            if self.survivors is not None:
                environment[survival.ENVIRONMENT] = str(self.survivors.folder)
            forked = fork(environment[SOCKET], agents.__name__, words, environment, self.folder, [1, 2])
            if forked is not None:
                return forked
            self.standby.give_up()
        command = [sys.executable, "-m", agents.__name__, *words]
        # In its own session, so that only the launcher receives Ctrl-C; it forwards the request.
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def _find_ranks(self) -> None:
        self.workers.update(agents.ranks_started(self.folder))
        for rank in self.workers:
            self.begun.setdefault(rank, time.monotonic())
        if self.survivors is not None and not self.invited and len(self.workers) == self.job.processes:
            # Survivors of an earlier attempt that have no rank in this one.
            self.survivors.dismiss(but=self.workers.values())

    def _pass_on(self) -> None:
        """Forward a stop request to every rank that handles the signal."""
        if self.stop_requests.now and self.kill_at is None:
            self.kill_at = 0.0
        number = self.stop_requests.stop
        if number is None:
            return
        for rank, pid in self.workers.items():
            if (rank, pid) not in self.signalled and process_state(pid) not in ("", "Z") and catches(pid, number):
                self.signalled.add((rank, pid))
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue

    def _look(self) -> None:
        alive = {rank: pid for rank, pid in self.workers.items() if process_state(pid) not in ("", "Z")}
        views = look(alive, self.folder, self.begun)
        self.step = max([self.step, *(view.position[0] for view in views)])
        if self.kill_at is not None:
            return
        self._note_failures()
        if self.failures:
            patience = min(map(_patience, self.failures.values()))
            if all(code < 0 or code == Exit.CRASH for code in self.failures.values()) and self._invite(views):
                patience = max(patience, _LEAVING)
            self._end_all(patience)
            self.rendezvous.alarm()
        elif self.rendezvous.alarmed():
            self.say("the attempt failed on another node: ending the ranks of this one")
            if views and max(view.silent for view in views) > 0.8 * self.job.limits.hang_timeout > 0:
                self._examine(views)
            else:
                self._invite(views)
            self._end_all(_LAST_WORDS)
        elif views and time.monotonic() >= self.patient_until and hanging(views, self.job.limits):
            self._examine(views)
            self._end_all(0.0)
            self.rendezvous.alarm()

    def _invite(self, views: Sequence[RankView]) -> bool:
        """Ask the ranks to stay for the next attempt, if each of them has finished a step in this one: whatever keeps
        an attempt from making progress may live on in a surviving process."""
        if self.survivors is not None and self.stop_requests.stop is None and all(view.settled for view in views):
            self.survivors.invite(self.number)
            self.invited = True
        return self.invited

    def _gather(self) -> None:
        """Once every rank has ended or waits for the next attempt, do not wait any longer."""
        if self.standby is None or self.kill_at is None:
            return
        if self.invited and self.survivors is not None:
            waiting = self.survivors.waiting()
            self.staying = {rank: pid for rank, pid in self.workers.items() if waiting.get(rank) == pid}
        left = [pid for rank, pid in self.workers.items() if rank not in self.staying]
        if all(process_state(pid) in ("", "Z") for pid in left):
            self._end_all(0.0)

    def _note_failures(self) -> None:
        """Record ranks that failed by themselves; ranks killed by this launcher do not count."""
        for rank, pid in self.workers.items():
            if rank in self.failures or process_state(pid) not in ("", "Z"):
                continue
            code = agents.exit_code(self.folder, pid)
            if code is None:
                # Wait for the agent to report the code, unless it is stuck. If it has ended, its own exit code counts.
                since = self.gone.setdefault(rank, time.monotonic())
                if time.monotonic() - since < _AGENT or self.agent.poll() is not None:
                    continue
                code = int(Exit.CRASH)
            if code == 0 or (code < 0 and self.kill_at is not None):
                continue
            self.failures[rank] = code
            if self.kill_at is None or code == Exit.CRASH:
                self._record_death(rank, pid, code)

    def _note_steps(self) -> None:
        """Note the steps that ranks began after the last look, which may be all those of a short attempt."""
        beats = [heartbeat.read(self.folder / f"rank_{rank:05d}") for rank in self.workers]
        self.step = max([self.step, *(beat.step for beat in beats if beat is not None)])

    def _record_death(self, rank: int, pid: int, code: int) -> None:
        beat = heartbeat.read(self.folder / f"rank_{rank:05d}")
        step = beat.step if beat and beat.pid == pid else -1
        text = _ended(code)
        if not (code >= 0 and code != Exit.CRASH):
            if self.kill_at is None:
                self.say(f"rank {rank} {text}" + (f", in step {step}" if step >= 0 else "") + ": ending this attempt")
            more: dict[str, object] = {"signal": -code} if code < 0 else {"exit_code": code}
            if code != -signal.SIGKILL:
                more["output"] = self._last_words(rank)
            self._record("death", text, rank=rank, step=step, **more)

    def _last_words(self, rank: int) -> str:
        try:
            lines = (self.logs / f"rank_{rank:05d}.err").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(line[:_WIDTH] for line in lines[-_LINES:])

    def _examine(self, silent: Sequence[RankView]) -> None:
        views, stacks = dump_stacks(silent, self.job.run_dir / "stacks")
        hang = diagnose(views, stacks)
        self.hang = f"a hang ({hang.cause}): {hang.text}"
        self.say(self.hang)
        self._record(
            "hang",
            hang.text,
            rank=hang.ranks[0] if hang.ranks else -1,
            step=hang.step,
            cause=hang.cause,
            ranks=list(hang.ranks),
            silent=round(max(view.silent for view in silent), 1),
            stacks={str(rank): path for rank, path in stacks.items()},
            where={str(view.rank): list(view.stack) for view in views if view.rank in hang.ranks},
        )

    def _end_all(self, patience: float) -> None:
        self.kill_at = time.monotonic() + patience

    def _kill(self) -> None:
        """Kill all remaining ranks with their child processes, then the agent if it does not exit by itself."""
        for pid in {**self.workers, **agents.ranks_below(self.agent.pid)}.values():
            if pid not in self.staying.values():
                end_group(pid)
        if self.standby is not None and self.agent.poll() is None:
            # It gets no notice of forked ranks that were killed or crashed, and would wait for those that stay.
            if any(code > 0 for code in self.failures.values()):
                time.sleep(_ECHO)
            self.agent.kill()
        try:
            self.agent.wait(_AGENT)
        except subprocess.TimeoutExpired:
            self.agent.kill()
            self.agent.wait()
        if self.standby is not None:
            self.standby.end_all(but=self.staying.values())

    def _ending(self) -> Ending:
        stop = self.stop_requests.stop is not None
        if self.hang:
            return Ending(Exit.HANG, self.hang, self.step, stop)
        failed = {rank: code for rank, code in self.failures.items() if not (stop and code == -signal.SIGTERM)}
        text = ", ".join(f"rank {rank} {_ended(code)}" for rank, code in failed.items())
        if any(code < 0 for code in failed.values()):
            return Ending(Exit.CRASH, text, self.step, stop, killed=True)
        # Ranks stop on request together, so if another rank crashed, REQUEUE is only a consequence of the crash.
        causes = [code for code in failed.values() if code != Exit.REQUEUE] or list(failed.values())
        for code in causes:
            if code in set(Exit) and not Exit(code).restarts:
                return Ending(Exit(code), self._recorded_text(code) or Exit(code).meaning, self.step, stop)
        if failed:
            return Ending(Exit.CRASH, text, self.step, stop)
        if self.agent.returncode == 0 and self.kill_at is None:
            return Ending(Exit.DONE, Exit.DONE.meaning, self.step, stop)
        return Ending(Exit.CRASH, self._agents_end(), self.step, stop, followed=self.kill_at is not None)

    def _recorded_text(self, code: int) -> str:
        """Text of the first event that a rank recorded with this exit code."""
        for event in read(self.job.run_dir):
            if event.get("attempt") == self.number and event.get("exit_code") == code:
                return str(event["text"])
        return ""

    def _agents_end(self) -> str:
        if self.kill_at is not None:
            return "the ranks of this node were ended"
        try:
            return f"the agent failed: {(self.folder / agents.ERROR).read_text()}"
        except OSError:
            return f"the agent {_ended(self.agent.wait())}"

    def _record(self, kind: str, text: str, **more: object) -> None:
        record(self.job.run_dir, kind, text, attempt=self.number, **more)


def _patience(code: int) -> float:
    """How long the other ranks may continue after one has ended with this code, in seconds."""
    if code < 0:
        return _AFTER_A_KILL
    if code == Exit.REQUEUE:
        return _STOPPING
    return _AGREEING if code in set(Exit) and code != Exit.CRASH else _LAST_WORDS


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name} (signal {-code})"
    except ValueError:
        return f"was ended by signal {-code}"
