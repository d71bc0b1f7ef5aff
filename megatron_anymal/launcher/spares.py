"""Spare nodes: launchers that wait, with everything imported, to take the place of a node that is lost.

Every launcher counts up a number in node 0's store. Node 0 gives the place of a node whose number stands still to a
spare, which then joins the run like a launcher that was lost and started again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Any, Optional

# In seconds: the interval between signs of life, the silence after which a node counts as lost, and, if there is a
# spare, the wait for a node that never joined.
_BEAT, SILENT, _ABSENT = 1.0, 8.0, 60.0


class Pulse:
    """Counts up a key of a store from a background thread, until stopped or the store is gone.

    Args:
        connect: opens a connection of the thread's own.
    """

    def __init__(self, connect: Callable[[], Any], key: str) -> None:
        self._connect, self._key = connect, key
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="anymal-pulse", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _run(self) -> None:
        # The main thread notices by itself that the store is gone.
        try:
            store = self._connect()
            while not self._stopped.is_set():
                store.add(self._key, 1)
                self._stopped.wait(_BEAT)
        except RuntimeError:
            return


class Places:
    """Node 0's view of the launchers: which nodes are silent, and which spares can take their places.

    Args:
        store: node 0's key-value store.
        prefix: of all keys.
        nodes: number of nodes of the run.
    """

    def __init__(self, store: Any, prefix: str, nodes: int) -> None:
        self._store, self._prefix, self._nodes = store, prefix, nodes
        # Key -> its last value, and when it changed.
        self._beats: dict[str, tuple[int, float]] = {}
        self._filled, self._begun = 0.0, time.monotonic()
        self._looked = self._begun

    def spares(self) -> list[int]:
        """Numbers of the spares that wait for a place and are alive."""
        count = int(self._store.add(f"{self._prefix}/spares", 0))
        return [n for n in range(count) if not self._exists(f"place/{n}") and self._silence(f"spare/{n}") < SILENT]

    def silent(self) -> list[int]:
        """Nodes without a sign of life, apart from node 0."""
        return [node for node in range(1, self._nodes) if self._silence(f"node/{node}") > self._limit(node)]

    def fill(self, missing: Collection[int]) -> dict[int, int]:
        """Give the places of those missing nodes that are silent to spares, at most once per second.

        Returns:
            Node -> spare.
        """
        if time.monotonic() - self._filled < _BEAT:
            return {}
        self._filled = time.monotonic()
        if not (spares := self.spares()):
            return {}
        given = dict(zip([node for node in self.silent() if node in missing], spares))
        for node, spare in given.items():
            self._store.set(f"{self._prefix}/given/{node}", _name(spare))
            self._store.set(f"{self._prefix}/place/{spare}", str(node))
            # The spare shows its signs of life under this number from now on.
            self._beats[f"node/{node}"] = (self._count(f"node/{node}"), time.monotonic())
        return given

    def have_left(self) -> bool:
        """Whether all waiting spares know that the run has ended."""
        return all(self._exists(f"left/{spare}") for spare in self.spares())

    def holder(self, node: int) -> str:
        """Name of the spare that has been given a node's place; empty: none."""
        return self._store.get(f"{self._prefix}/given/{node}").decode() if self._exists(f"given/{node}") else ""

    def _limit(self, node: int) -> float:
        return SILENT if self._count(f"node/{node}") else _ABSENT

    def _silence(self, key: str) -> float:
        """Seconds since a number changed, or since it was first looked at."""
        count, now = self._count(key), time.monotonic()
        if now - self._looked > SILENT - 2 * _BEAT:
            # Nobody looked: this launcher was suspended, and the others probably too.
            self._beats = {key: (count, now) for key, (count, _) in self._beats.items()}
        self._looked = now
        if key not in self._beats:
            self._beats[key] = (count, now if count else self._begun)
        elif self._beats[key][0] != count:
            self._beats[key] = (count, now)
        return now - self._beats[key][1]

    def _count(self, key: str) -> int:
        return int(self._store.add(f"{self._prefix}/{key}", 0))

    def _exists(self, key: str) -> bool:
        return bool(self._store.check([f"{self._prefix}/{key}"]))


class Spare:
    """A launcher that waits for the place of a lost node.

    Args:
        store: node 0's key-value store.
        prefix: of all keys.
        connect: opens another connection to the store.
    """

    def __init__(self, store: Any, prefix: str, connect: Callable[[], Any]) -> None:
        self._store, self._prefix = store, prefix
        self.number = int(store.add(f"{prefix}/spares", 1)) - 1
        self.pulse = Pulse(connect, f"{prefix}/spare/{self.number}")

    @property
    def name(self) -> str:
        """Name under which the holder of a node's place is recorded."""
        return _name(self.number)

    def place(self) -> Optional[int]:
        """The node whose place this spare has been given; None: none yet."""
        key = f"{self._prefix}/place/{self.number}"
        return int(self._store.get(key)) if self._store.check([key]) else None

    def leave(self) -> None:
        """Tell node 0 that this spare knows that the run has ended."""
        self._store.set(f"{self._prefix}/left/{self.number}", "")


def _name(spare: int) -> str:
    return f"spare {spare}"
