"""Reads prompts that are answered next on other threads, while the model computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Optional, TypeVar

from megatron_anymal.generation.prompts import Prompt

Read = TypeVar("Read")
# Decoders release the interpreter's lock, but what is around them does not: more threads gain little.
_MOST_THREADS = 8


class ReadAhead(Generic[Read]):
    """Results of `read` for groups of prompts, made in advance for those that were announced."""

    def __init__(self, read: Callable[[Sequence[Prompt]], Read]):
        """No thread starts before something is announced.

        Args:
            read: reads prompts that are read together, on any thread.
        """
        self._read = read
        self._pool: Optional[ThreadPoolExecutor] = None
        # By the identity of a group's prompts, which are kept alive.
        self._pending: dict[tuple[int, ...], tuple[Sequence[Prompt], Future[Read]]] = {}

    def announce(self, groups: Sequence[Sequence[Prompt]]) -> None:
        """Begin to read these groups, in this order; earlier announcements that are not repeated are dropped."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(reading_threads(), thread_name_prefix="anymal-read-ahead")
        before, self._pending = self._pending, {}
        for group in groups:
            key = _key(group)
            if key in self._pending:
                continue
            self._pending[key] = before.pop(key) if key in before else (group, self._pool.submit(self._read, group))
        for _, dropped in before.values():
            dropped.cancel()

    def take(self, group: Sequence[Prompt]) -> Read:
        """The result for a group, read now unless it was announced. What `read` raised is raised here."""
        _, pending = self._pending.pop(_key(group), (group, None))
        return pending.result() if pending else self._read(group)


def reading_threads() -> int:
    """Number of threads: this process's share of the machine's cores, at most 8."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // processes))


def _key(group: Sequence[Prompt]) -> tuple[int, ...]:
    return tuple(map(id, group))
