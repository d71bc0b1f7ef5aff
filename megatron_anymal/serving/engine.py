"""The thread that computes: requests join the running batch between steps and leave it when they are answered.

Clients are tasks of an event loop. Each reads the latest state of its answer when it gets to it, so a slow client holds
one text in memory and never delays the others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from megatron_anymal.generation.running_batch import RunningBatch, RunningPrompt

_LOG = logging.getLogger(__name__)
# Maximum number of tokens, with padding, of prompts computed in one pass; a single prompt may be longer.
_FIRST_PASS_TOKENS = 8192


@dataclass(frozen=True)
class AnswerState:
    """The state of an answer."""

    # The part of the text that further tokens cannot change.
    text: str
    # Tokens of the answer so far.
    tokens: int
    # Why the answer is over: stop, length, cancelled, failed or shutdown; empty while it is not.
    finish: str


class Ticket:
    """A request in the engine."""

    def __init__(self, running: RunningPrompt, *, watched: bool):
        """Prepare a request of the running event loop.

        Args:
            watched: report the text after each token, rather than once.
        """
        self.running, self.watched = running, watched
        self.cancelled = False
        # Set by the engine's thread, cleared by the client.
        self._latest, self._unread = AnswerState("", 0, ""), False
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    async def next(self) -> AnswerState:
        """Wait for news of the answer."""
        await self._event.wait()
        self._event.clear()
        self._unread = False
        return self._latest

    def publish(self, finish: str = "") -> bool:
        """In the engine's thread: record the answer's state if somebody wants it, and return whether to wake the
        client."""
        answer = self.running.answer
        if not finish and answer.done:
            finish = "length" if answer.cut_off else "stop"
        if not finish and (not self.watched or self._unread):
            return False
        self._latest, self._unread = AnswerState(answer.settled, len(answer.tokens), finish), True
        return True

    def wake(self) -> None:
        """In the engine's thread: make `next` return."""
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:
            # The server has ended meanwhile, and its event loop with it.
            _LOG.debug("a client's event loop is closed")


class Engine:
    """Answers tickets with one running batch, in a thread of its own."""

    def __init__(self, batch: RunningBatch, max_batch: int, max_cache_tokens: int):
        """Start the thread.

        Args:
            max_batch: maximum number of answers computed together.
            max_cache_tokens: maximum number of tokens in the key-value cache: rows times the longest prompt with its
                answer.
        """
        self.max_cache_tokens = max_cache_tokens
        # Whether the last pass failed.
        self.broken = False
        self._batch, self._max_batch = batch, max_batch
        self._waiting: deque[Ticket] = deque()
        # In the order of the batch's rows.
        self._tickets: list[Ticket] = []
        self._news, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that are being computed."""
        return len(self._tickets)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        return len(self._waiting)

    def submit(self, ticket: Ticket) -> None:
        """Answer a request; its `running.longest` must be at most `max_cache_tokens`."""
        with self._news:
            if not self._stopping:
                self._waiting.append(ticket)
                self._news.notify()
                return
        self._end([ticket], "shutdown")

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request; its place is free before the next step."""
        with self._news:
            ticket.cancelled = True
            self._news.notify()

    def stop(self) -> None:
        """End the thread after its current step; requests that are not answered end with `shutdown`."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                while not (self._waiting or self._tickets or self._stopping):
                    self._news.wait()
                if self._stopping:
                    self._end([*self._tickets, *self._waiting], "shutdown")
                    self._waiting.clear()
                    return
            self._drop()
            self._admit()
            if self._tickets:
                self._step()

    def _drop(self) -> None:
        """Remove requests that were given up or answered."""
        gone = [ticket for ticket in self._tickets if ticket.cancelled or ticket.running.answer.done]
        with self._news:
            gone += [ticket for ticket in self._waiting if ticket.cancelled]
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
        left = [row for row, ticket in enumerate(self._tickets) if ticket not in gone]
        if len(left) < len(self._tickets):
            self._batch.keep(left)
            self._tickets = [self._tickets[row] for row in left]
        self._end([ticket for ticket in gone if ticket.cancelled], "cancelled")

    def _admit(self) -> None:
        """Let waiting requests join, first come, first served."""
        while joining := self._next_group():
            if not self._join(joining):
                # One of them may be at fault, or they need too much memory together.
                alone = joining if len(joining) > 1 else []
                self._end([ticket for ticket in joining if not (alone and self._join([ticket]))], "failed")
            self._drop()

    def _join(self, tickets: list[Ticket]) -> bool:
        """Let requests join together, and return whether that worked."""
        try:
            self._batch.join([ticket.running for ticket in tickets])
        except Exception:
            self.broken = True
            _LOG.exception("computing %d prompt(s) failed", len(tickets))
            return False
        self.broken = False
        self._tickets += tickets
        self._publish(tickets)
        return True

    def _next_group(self) -> list[Ticket]:
        """Take the next requests that fit into the batch and can be computed in one pass."""
        group: list[Ticket] = []
        with self._news:
            while self._waiting and len(self._tickets) + len(group) < self._max_batch:
                candidate = self._waiting[0].running
                everyone = [ticket.running for ticket in (*self._tickets, *group)] + [candidate]
                prompts = [len(ticket.running.prompt) for ticket in group] + [len(candidate.prompt)]
                if len(everyone) * max(one.longest for one in everyone) > self.max_cache_tokens:
                    break
                if group and len(prompts) * max(prompts) > _FIRST_PASS_TOKENS:
                    break
                group.append(self._waiting.popleft())
        return group

    def _step(self) -> None:
        try:
            self._batch.step()
            self.broken = False
        except Exception:
            # The cache may be half updated: nothing of it can be used.
            self.broken = True
            _LOG.exception("a step of %d answer(s) failed", len(self._tickets))
            self._batch.keep([])
            failed, self._tickets = self._tickets, []
            self._end(failed, "failed")
            return
        self._publish(self._tickets)

    def _publish(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if ticket.publish():
                ticket.wake()

    def _end(self, tickets: Sequence[Ticket], finish: str) -> None:
        for ticket in tickets:
            ticket.publish(finish)
            ticket.wake()


def too_long(running: RunningPrompt, engine: Engine) -> Optional[str]:
    """Why a request can never be answered; None if it can."""
    if running.longest <= engine.max_cache_tokens:
        return None
    return (
        f"the prompt has {len(running.prompt)} tokens, including its media, and max_tokens allows "
        f"{running.answer.room} more; this server's --max-cache-tokens is {engine.max_cache_tokens}. Shorten it."
    )
