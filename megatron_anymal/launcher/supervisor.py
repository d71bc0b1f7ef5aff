"""Run a job in successive attempts until it is done, is stopped, or stops making progress."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Optional

from megatron_anymal.config import composed_ahead
from megatron_anymal.launcher.attempt import Attempt, rank_environment
from megatron_anymal.launcher.console import announce
from megatron_anymal.launcher.job import Decision, Ending, Job, Restarts, new_attempt
from megatron_anymal.launcher.rendezvous import HeadLost, MultiNode, NodeLost, SingleNode, join_rendezvous
from megatron_anymal.launcher.report import write_report
from megatron_anymal.launcher.standby import RANK_MODULES, Standby
from megatron_anymal.launcher.stop_requests import Stopped, StopRequests
from megatron_anymal.launcher.survivors import Survivors
from megatron_anymal.peer_memory.server import MemoryServer
from megatron_anymal.resilience.events import record
from megatron_anymal.resilience.exit_codes import Exit


class Supervisor:
    """Runs a job on this node, in coordination with the supervisors of the other nodes.

    Raises:
        ConfigError: the run's folder cannot be written.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.leads = job.node == 0
        self.stop_requests = StopRequests()
        self.number = 0
        self.standby: Optional[Standby] = None
        self.survivors: Optional[Survivors] = None
        self.memory: Optional[MemoryServer] = None

    def run(self) -> int:
        """Run to the end; return the exit code."""
        with self.stop_requests.heard():
            try:
                if self.job.standby:
                    modules = (*RANK_MODULES, *self.job.preload)
                    self.standby = Standby(rank_environment(self.job), modules, self._say, composed_ahead.export())
                    self.survivors = Survivors(self.standby.folder) if self.job.keep_survivors else None
                if self.job.peer_memory:
                    host = (self.job.local_addr or socket.gethostname()) if self.job.nodes > 1 else None
                    kept_for = self.job.run_dir if self.job.keep_memory else None
                    self.memory = MemoryServer(self.job.processes, host, kept_for)
                    if why := self.memory.not_kept:
                        self._say(f"warning: the copies in memory will not outlive a launcher that is killed: {why}")
                decision = self._attempts()
            except Stopped:
                decision = Decision(Exit.REQUEUE, "stopped on request, while no rank was running")
            except NodeLost as error:
                decision = Decision(Exit.CRASH, str(error))
            finally:
                if self.standby is not None:
                    self.standby.close()
                if self.memory is not None:
                    self.memory.close()
            self._end(decision)
        return int(decision.code)

    def _attempts(self) -> Decision:
        rendezvous = self._join()
        if rendezvous is None:
            return Decision(Exit.DONE, "the run has ended without a need for this spare node")
        restarts = Restarts(self.job.run_dir)
        while True:
            try:
                decision = self._attempt(rendezvous, restarts)
            except HeadLost as error:
                self._say(f"{error} Waiting for it to be started again.")
                rendezvous = join_rendezvous(self.job, self.stop_requests.check)
                continue
            if decision.pause is None:
                rendezvous.leave()
                return decision
            when = f"in {decision.pause:g} s" if decision.pause else "now"
            text = f"attempt {self.number}: {decision.text}. Starting again {when}"
            self._say(text)
            if self.leads:
                record(self.job.run_dir, "restart", text, attempt=self.number, pause=decision.pause)
            if decision.forget:
                # The state itself may be what fails.
                if self.memory is not None:
                    self.memory.clear()
                if self.survivors is not None:
                    self.survivors.dismiss()
            self.stop_requests.sleep(decision.pause)

    def _join(self) -> Optional[SingleNode]:
        """Join the other nodes; a spare first waits for a place, and gets None if the run ends before."""
        while True:
            rendezvous = join_rendezvous(self.job, self.stop_requests.check)
            if not self.job.spare:
                return rendezvous
            assert isinstance(rendezvous, MultiNode)
            self._say("waiting as a spare node")
            try:
                node = rendezvous.take_place()
            except HeadLost as error:
                self._say(f"{error} Waiting for it to be started again.")
                continue
            if node is None:
                return None
            self.job = replace(self.job, node=node, spare=False)
            self._say("taking the place of a node that is lost")
            return rendezvous

    def _attempt(self, rendezvous: SingleNode, restarts: Restarts) -> Decision:
        address = self.memory.address if self.memory else ""
        self.number = rendezvous.agree(lambda: new_attempt(self.job.run_dir), address)
        stayed = len(self.survivors.waiting()) if self.survivors else 0
        text = f"{self.job.nodes} x {self.job.processes} processes" + (f", {stayed} of them stayed" if stayed else "")
        self._say(f"attempt {self.number}: {text}; logs in {self.job.run_dir}/logs/attempt_{self.number}")
        standby = self._ready_standby()
        if self.leads:
            way = "standby" if standby else "anew"
            more = {"launcher": self.job.launcher, "way": way, "stayed": stayed}
            record(self.job.run_dir, "start", text, attempt=self.number, **more)
        variables = self.memory.environment(rendezvous.neighbour()) if self.memory else {}
        survivors = self.survivors if standby else None
        attempt = Attempt(
            self.job, self.number, rendezvous, self.stop_requests, self._say, standby, variables, survivors
        )
        ending: Ending = attempt.run()
        return rendezvous.decide(ending, restarts.decide)

    def _ready_standby(self) -> Optional[Standby]:
        if self.standby is None:
            return None
        self.standby.begin()
        return self.standby if self.standby.wait(self.stop_requests.check, self.job.limits.startup_timeout) else None

    def _end(self, decision: Decision) -> None:
        """Print the outcome and write the report, unless the folder belongs to another job."""
        code = decision.code
        self._say(
            f"exit code {int(code)}, {code.meaning}" + (f": {decision.text}" if decision.text != code.meaning else "")
        )
        if not self.leads or code == Exit.LOCKED:
            return
        if code == Exit.CRASH_LOOP:
            record(self.job.run_dir, "crash_loop", decision.text, attempt=self.number)
        record(self.job.run_dir, "end", decision.text, attempt=self.number, exit_code=int(code))
        try:
            path = write_report(self.job.run_dir, code, decision.text)
        except OSError as error:
            self._say(f"warning: the report could not be written: {error}")
        else:
            self._say(f"report: {path}")

    def _say(self, text: str) -> None:
        announce(self.job, text)
