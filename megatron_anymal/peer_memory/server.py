"""The launcher's side: memory of this node in which its ranks, and those of a neighbour, keep copies of their state.

The memory belongs to the launcher, so that it outlives the ranks and is freed when the launcher ends. On a single node
a keeper (keeper.py) has it too, for a minute after a launcher was killed.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Optional

from megatron_anymal.peer_memory import keeper, wire
from megatron_anymal.peer_memory.slots import Copy, SlotFile, parse_copy

# Environment variable with a JSON object: where a rank keeps its copies (rank_copies.py).
MEMORY = "ANYMAL_PEER_MEMORY"


class MemoryServer:
    """Memory for the copies of this node's ranks and, with several nodes, a server that takes those of a neighbour.

    Args:
        processes: number of ranks on this node.
        host: address of this node for the others; None: there are no others.
        kept_for: the run's folder, if copies of a launcher of this run that was killed may be taken over, and this
            one's are to be kept likewise; None: neither.
    """

    def __init__(self, processes: int, host: Optional[str] = None, kept_for: Optional[Path] = None) -> None:
        self._keeper: Optional[socket.socket] = None
        # Why the memory ends with this launcher although it was to be kept; empty otherwise.
        self.not_kept = ""
        self._own = self._begin(processes, kept_for)
        # Rank of a neighbour -> its memory, the connection that may write to it, and what is held while one does.
        self._held: dict[int, str] = {}
        self._writers: dict[int, socket.socket] = {}
        self._writing: dict[int, threading.Lock] = {}
        self._descriptors = [int(path.rsplit("/", 1)[1]) for path in self._own]
        self._lock = threading.Lock()
        self._secret = secrets.token_hex()
        self._listener: Optional[socket.socket] = None
        # SECRET@HOST:PORT of the server; empty on a single node.
        self.address = ""
        if host is not None:
            self._listener = _listen()
            self.address = f"{self._secret}@{host}:{self._listener.getsockname()[1]}"
            threading.Thread(target=self._accept, name="anymal-memory", daemon=True).start()

    def environment(self, neighbour: str = "") -> dict[str, str]:
        """Environment variables that tell this node's ranks where to keep their copies.

        Args:
            neighbour: address of another node's server.
        """
        location = {"files": self._own, "server": self.address, "neighbour": neighbour}
        return {MEMORY: json.dumps(location)}

    def clear(self) -> None:
        """Drop all copies."""
        for path in self._paths():
            SlotFile(path).clear()

    def close(self) -> None:
        """Free the memory."""
        if self._listener is not None:
            self._listener.close()
        with self._lock:
            for connection in self._writers.values():
                connection.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        if self._keeper is not None:
            keeper.end(self._keeper)

    def _begin(self, processes: int, kept_for: Optional[Path]) -> list[str]:
        """Paths of this node's memory, taken over or new."""
        adopted = keeper.adopt(kept_for, processes) if kept_for is not None else None
        if adopted is not None:
            files, self._keeper = adopted
            return [_path(file) for file in files]
        own = [_memory(f"anymal_rank_{number}") for number in range(processes)]
        if kept_for is not None:
            try:
                self._keeper = keeper.start(kept_for, [int(path.rsplit("/", 1)[1]) for path in own])
            except keeper.NoKeeper as error:
                self.not_kept = str(error)
        return own

    def _paths(self) -> list[str]:
        with self._lock:
            return [*self._own, *self._held.values()]

    def _copies(self) -> Iterator[tuple[SlotFile, int, Copy]]:
        for path in self._paths():
            file = SlotFile(path)
            for slot, copy in file.copies().items():
                yield file, slot, copy

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                # Closed.
                return
            threading.Thread(target=self._serve, args=(connection,), name="anymal-memory", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, KeyError, TypeError):
            connection.settimeout(wire.TIMEOUT)
            while True:
                request = wire.receive(connection)
                if not secrets.compare_digest(str(request.get("secret", "")), self._secret):
                    return
                # A rank may take long between two copies.
                connection.settimeout(None)
                if request["ask"] == "list":
                    wire.send(connection, {"copies": [asdict(copy) for _, _, copy in self._copies()]})
                elif request["ask"] == "get":
                    self._give(connection, parse_copy(request["copy"]))
                elif request["ask"] == "put":
                    self._take(connection, parse_copy(request["copy"]))

    def _give(self, connection: socket.socket, wanted: Copy) -> None:
        for file, slot, copy in self._copies():
            if copy == wanted:
                wire.send(connection, {"found": True}, file.data(slot)[: copy.size])
                return
        wire.send(connection, {"found": False})

    def _take(self, connection: socket.socket, copy: Copy) -> None:
        # The writer before has been cut off, but may still be storing what it had received.
        with self._take_over(connection, copy.rank):
            try:
                file, slot = self._prepare(connection, copy)
            except OSError:
                wire.send(connection, {"taken": False})
                raise
            wire.receive_into(connection, file.data(slot))
            with self._lock:
                if self._writers.get(copy.rank) is connection:
                    file.commit(slot, copy)
        wire.send(connection, {"taken": True})

    def _take_over(self, connection: socket.socket, rank: int) -> threading.Lock:
        """Make this connection the only one that may write to a rank's memory; what is returned is held meanwhile."""
        with self._lock:
            before = self._writers.get(rank)
            if before is not None and before is not connection:
                # Its rank is gone, perhaps without having closed the connection.
                with suppress(OSError):
                    before.shutdown(socket.SHUT_RDWR)
            self._writers[rank] = connection
            return self._writing.setdefault(rank, threading.Lock())

    def _prepare(self, connection: socket.socket, copy: Copy) -> tuple[SlotFile, int]:
        """Return a rank's memory and the slot to write."""
        with self._lock:
            if self._writers.get(copy.rank) is not connection:
                raise ConnectionError("another connection has taken over")
            if copy.rank not in self._held:
                self._held[copy.rank] = _memory(f"anymal_peer_{copy.rank}")
                self._descriptors.append(int(self._held[copy.rank].rsplit("/", 1)[1]))
            file = SlotFile(self._held[copy.rank], copy.size)
            return file, file.begin()


def _memory(name: str) -> str:
    """Create a file in memory, and return its path."""
    return _path(os.memfd_create(name))


def _path(descriptor: int) -> str:
    """A path under which processes of this user can open a file of this process."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _listen() -> socket.socket:
    """Listen at a free port of all interfaces: a host name may stand for the loopback address on its own machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=256, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=256)
