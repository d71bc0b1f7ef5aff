"""Rendezvous of the launchers of several nodes: they agree on attempt numbers, on failures, and on what to do next.

Node 0's launcher hosts a key-value store that outlives the attempts. All launchers, and the agents they start, are its
clients. An agent's rendezvous ID contains the attempt number, so that it never meets agents of an earlier attempt. A
launcher that was killed and started again joins the next attempt; the one in progress is lost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from typing import Any, Optional

from megatron_anymal.launcher.console import announce
from megatron_anymal.launcher.job import Decision, Ending, Job, combined
from megatron_anymal.launcher.spares import SILENT, Places, Pulse, Spare
from megatron_anymal.resilience.events import record
from megatron_anymal.resilience.exit_codes import Exit

# Polling interval, polling interval for alarms of other nodes, and timeout of a connection attempt, in seconds.
_LOOK, _ALARM, _CONNECT = 0.2, 1.0, 5.0
# How long node 0 keeps the store open for the others to read the last decision, in seconds.
_FAREWELL = 10.0


class NodeLost(RuntimeError):
    """A node is gone, or did not join in time."""


class HeadLost(NodeLost):
    """Node 0's launcher, which hosts the store, is gone; it may be started again."""


class SingleNode:
    """Rendezvous of a run on one node, which has no one to agree with."""

    # The agent hosts the store itself, at a free port.
    agent_arguments: tuple[str, ...] = ("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")

    def agree(self, number: Callable[[], int], address: str = "") -> int:
        """Agree on the number of the next attempt; `number` is called on node 0.

        Args:
            address: this node's, for the others.

        Raises:
            NodeLost: not all nodes joined in time.
        """
        return number()

    def neighbour(self) -> str:
        """Address that the next node gave for this attempt; empty on one node."""
        return ""

    def alarm(self) -> None:
        """Notify the other nodes that this attempt has failed."""

    def alarmed(self) -> bool:
        """Whether the attempt has failed on another node."""
        return False

    def decide(self, ending: Ending, decide: Callable[[Ending], Decision]) -> Decision:
        """Agree on what to do after an attempt has ended on all nodes; `decide` is called on node 0.

        Raises:
            NodeLost: not all nodes reported in time.
        """
        return decide(ending)

    def leave(self) -> None:
        """Leave the rendezvous after the last decision."""


class MultiNode(SingleNode):
    """Rendezvous of one of several launchers.

    Args:
        check: called while waiting; may raise to end the wait.

    Raises:
        NodeLost: node 0's launcher cannot be reached within the job's rdzv_timeout.
    """

    def __init__(self, job: Job, check: Callable[[], None]) -> None:
        self._job, self._check, self._round = job, check, 0
        self._looked, self._failed = 0.0, False
        # Name under which this launcher was given its node's place; empty: it is the node's own.
        self._name = ""
        self._store = self._connect()
        self._places = Places(self._store, self._prefix, job.nodes)
        self._pulse = Pulse(self._connect, f"{self._prefix}/node/{job.node}") if job.node > 0 else None
        self.agent_arguments = (
            f"--rdzv-endpoint={job.endpoint}",
            f"--rdzv-conf=is_host=0,join_timeout={job.rdzv_timeout:.0f}",
            *([f"--local-addr={job.local_addr}"] if job.local_addr else []),
        )

    def take_place(self) -> Optional[int]:
        """As a spare, wait until a node is lost, and take its place.

        Returns:
            The node; None: the run has ended without a need for this spare.

        Raises:
            HeadLost: node 0's launcher is gone.
        """
        spare = self._ask(lambda: Spare(self._store, self._prefix, self._connect))
        try:
            while not self._ask(lambda: self._store.check([self._over])):
                node: Optional[int] = self._ask(spare.place)
                if node is not None:
                    self._job, self._name = replace(self._job, node=node), spare.name
                    self._pulse = Pulse(self._connect, f"{self._prefix}/node/{node}")
                    return node
                self._pause("joined")
            self._ask(spare.leave)
            return None
        finally:
            spare.pulse.stop()

    def agree(self, number: Callable[[], int], address: str = "") -> int:
        """Agree on the number of the next attempt; `number` is called on node 0.

        Args:
            address: this node's, for the others.

        Raises:
            NodeLost: not all nodes joined in time, or this node's place was given to a spare.
            HeadLost: node 0's launcher is gone.
        """
        self._check_place()
        self._round = self._next_round()
        self._looked, self._failed = 0.0, False
        self._set(f"joined/{self._job.node}", address)
        if self._job.node == 0:
            self._await_all("joined", "did not join")
            self._set("number", str(number()))
        return int(self._await("number", "node 0 did not start the attempt"))

    def neighbour(self) -> str:
        """Address that the next node gave for this attempt.

        Raises:
            HeadLost: node 0's launcher is gone.
        """
        return self._get(f"joined/{(self._job.node + 1) % self._job.nodes}")

    def alarm(self) -> None:
        """Notify the other nodes that this attempt has failed."""
        self._failed = True
        try:
            self._set("alarm", "")
        except NodeLost as error:
            # Only print it here; the decision that follows will raise it.
            announce(self._job, str(error))

    def alarmed(self) -> bool:
        """Whether the attempt has failed on another node, or node 0's launcher is gone."""
        if not self._failed and time.monotonic() - self._looked > _ALARM:
            self._looked = time.monotonic()
            # Without node 0 there can be no decision either.
            try:
                self._failed = self._exists("alarm") or self._finds_silent()
            except NodeLost:
                self._failed = True
        return self._failed

    def _finds_silent(self) -> bool:
        """On node 0: whether a node is silent while there is a spare for it."""
        if self._job.node or not self._ask(self._places.spares) or not (lost := self._ask(self._places.silent)):
            return False
        text = f"node {lost[0]} has shown no sign of life for {SILENT:g} s"
        record(self._job.run_dir, "death", text, attempt=int(self._get("number")))
        self.alarm()
        return True

    def decide(self, ending: Ending, decide: Callable[[Ending], Decision]) -> Decision:
        """Agree on what to do after an attempt has ended on all nodes; `decide` is called on node 0.

        Raises:
            NodeLost: not all nodes reported in time.
            HeadLost: node 0's launcher is gone.
        """
        self._set(f"ending/{self._job.node}", json.dumps(asdict(ending)))
        if self._job.node == 0:
            endings = [_ending(text) for text in self._await_all("ending", "did not report the end of the attempt")]
            self._set("decision", json.dumps(asdict(decide(combined(endings)))))
        decision = json.loads(self._await("decision", "node 0 did not post a decision"))
        self._set(f"seen/{self._job.node}", "")
        return Decision(**{**decision, "code": Exit(decision["code"])})

    def leave(self) -> None:
        """Leave the rendezvous after the last decision; node 0 first waits until the other nodes have read it.

        Raises:
            HeadLost: node 0 cannot reach its own store.
        """
        deadline = time.monotonic() + _FAREWELL
        if self._job.node == 0:
            self._ask(lambda: self._store.set(self._over, ""))
            while time.monotonic() < deadline and not self._all_left():
                time.sleep(_LOOK)
        elif self._pulse is not None:
            self._pulse.stop()

    def _all_left(self) -> bool:
        return all(self._exists(f"seen/{node}") for node in range(self._job.nodes)) and self._ask(
            self._places.have_left
        )

    def _check_place(self) -> None:
        if self._ask(partial(self._places.holder, self._job.node)) not in ("", self._name):
            raise NodeLost(
                f"the place of node {self._job.node} was given to a spare while this launcher was lost or silent. "
                "Start it again with --spare instead of --node-rank."
            )

    def _next_round(self) -> int:
        if self._job.node == 0:
            self._ask(lambda: self._store.set(self._rounds, str(self._round + 1)))
            return self._round + 1
        if self._round:
            return self._round + 1
        deadline = time.monotonic() + self._job.rdzv_timeout
        while not self._ask(lambda: self._store.check([self._rounds])):
            if time.monotonic() > deadline:
                raise NodeLost(f"node 0 did not start within {self._job.rdzv_timeout:g} s.")
            self._pause("joined")
        self._round = int(self._ask(lambda: self._store.get(self._rounds)))
        if not self._exists(f"joined/{self._job.node}"):
            return self._round
        # An earlier launcher of this node took part in this round and can no longer report its ending.
        what = "was lost, and a spare takes its place" if self._name else "was lost and started again"
        text = f"the launcher of node {self._job.node} {what}"
        attempt = int(self._get("number")) if self._exists("number") else 0
        record(self._job.run_dir, "death", text, attempt=attempt)
        self.alarm()
        self._set(f"ending/{self._job.node}", json.dumps(asdict(Ending(Exit.CRASH, text))))
        return self._round + 1

    @property
    def _prefix(self) -> str:
        return f"anymal/{self._job.identity}"

    @property
    def _rounds(self) -> str:
        """Key under which node 0 posts the number of the round."""
        return f"{self._prefix}/round"

    @property
    def _over(self) -> str:
        """Key that says that the run has ended."""
        return f"{self._prefix}/over"

    def _connect(self) -> Any:
        from torch.distributed import TCPStore

        host, _, port = self._job.endpoint.rpartition(":")
        deadline = time.monotonic() + self._job.rdzv_timeout
        while True:
            self._check()
            try:
                return TCPStore(
                    host,
                    int(port),
                    is_master=self._job.node == 0,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=_CONNECT),
                )
            except RuntimeError as error:
                if self._job.node == 0:
                    raise NodeLost(
                        f"this launcher cannot listen at --rdzv-endpoint={self._job.endpoint} ({_first_line(error)})."
                    ) from None
                if time.monotonic() > deadline:
                    raise NodeLost(
                        f"node 0's launcher cannot be reached at --rdzv-endpoint={self._job.endpoint} within "
                        f"--rdzv-timeout={self._job.rdzv_timeout:g} s ({_first_line(error)})."
                    ) from None
                time.sleep(_LOOK)

    def _await_all(self, what: str, failed: str) -> list[str]:
        deadline = time.monotonic() + self._job.rdzv_timeout
        missing = list(range(self._job.nodes))
        while missing:
            missing = [node for node in missing if not self._exists(f"{what}/{node}")]
            if missing and time.monotonic() > deadline:
                names = ", ".join(map(str, missing))
                raise NodeLost(f"node {names} of {self._job.nodes} {failed} within {self._job.rdzv_timeout:g} s.")
            for node, spare in (self._ask(partial(self._places.fill, missing)) if missing else {}).items():
                announce(self._job, f"node {node} is lost: spare {spare} takes its place")
            if missing:
                self._pause(what)
        return [self._get(f"{what}/{node}") for node in range(self._job.nodes)]

    def _await(self, what: str, failed: str) -> str:
        # Twice the timeout, since node 0 itself waits for all nodes first.
        deadline = time.monotonic() + 2 * self._job.rdzv_timeout
        while not self._exists(what):
            if time.monotonic() > deadline:
                raise NodeLost(f"{failed} within {2 * self._job.rdzv_timeout:g} s.")
            self._pause(what)
        return self._get(what)

    def _pause(self, what: str) -> None:
        # A stop request ends the wait for an attempt, but not the agreement on how one ended.
        if what in ("joined", "number"):
            self._check()
        time.sleep(_LOOK)

    def _key(self, what: str) -> str:
        return f"{self._prefix}/{self._round}/{what}"

    def _set(self, what: str, value: str) -> None:
        self._ask(lambda: self._store.set(self._key(what), value))

    def _get(self, what: str) -> str:
        value = self._ask(lambda: self._store.get(self._key(what)))
        return bytes(value).decode()

    def _exists(self, what: str) -> bool:
        return bool(self._ask(lambda: self._store.check([self._key(what)])))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError as error:
            raise HeadLost(f"node 0's launcher is gone ({_first_line(error)}).") from None


def join_rendezvous(job: Job, check: Callable[[], None]) -> SingleNode:
    """Join the rendezvous that a job needs.

    Raises:
        NodeLost: node 0's launcher cannot be reached, or cannot listen at the endpoint.
    """
    return MultiNode(job, check) if job.nodes > 1 else SingleNode()


def _ending(text: str) -> Ending:
    fields = json.loads(text)
    return Ending(**{**fields, "code": Exit(fields["code"])})


def _first_line(error: BaseException) -> Optional[str]:
    return next(iter(str(error).splitlines()), None)
