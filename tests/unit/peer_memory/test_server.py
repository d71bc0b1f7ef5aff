"""Memory of a node: copies of its own ranks, and those that a neighbour's ranks send."""

from __future__ import annotations

import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_anymal.peer_memory import wire
from megatron_anymal.peer_memory.rank_copies import CopyLocation, copy_location
from megatron_anymal.peer_memory.server import MEMORY, MemoryServer
from megatron_anymal.peer_memory.slots import Copy, SlotFile


@pytest.fixture
def server() -> Iterator[MemoryServer]:
    server = MemoryServer(2, "127.0.0.1")
    yield server
    server.close()


def copy_of(data: bytes, step: int, rank: int = 7) -> Copy:
    return Copy(rank, step, "run", len(data), zlib.crc32(data), (step,))


def put(server: MemoryServer, data: bytes, step: int) -> Copy:
    copy = copy_of(data, step)
    with wire.connect(server.address) as connection:
        wire.put(connection, server.address, copy, memoryview(data))
    return copy


def test_a_neighbours_copies_come_back(server: MemoryServer) -> None:
    copies = [put(server, bytes([step]) * 1_000_000, step) for step in (1, 2, 3)]
    assert sorted(wire.list_copies(server.address), key=lambda copy: copy.step) == copies[1:]
    assert wire.fetch(server.address, copies[2]) == bytes([3]) * 1_000_000
    with pytest.raises(OSError, match="no longer has rank 7's copy of step 1"):
        wire.fetch(server.address, copies[0])


def test_copies_of_own_ranks_are_served_too(server: MemoryServer) -> None:
    where = copy_location({**server.environment("secret@next:1"), "LOCAL_RANK": "1"})
    assert where == CopyLocation(where.file, server.address, "secret@next:1") if where else False
    file = SlotFile(where.file, 50)
    slot = file.begin()
    file.data(slot)[:] = b"x" * 50
    file.commit(slot, copy := copy_of(b"x" * 50, 4, rank=1))
    assert wire.list_copies(server.address) == [copy]
    assert wire.fetch(server.address, copy) == b"x" * 50
    server.clear()
    assert wire.list_copies(server.address) == []


def test_a_connection_that_ends_midway_leaves_the_older_copy(server: MemoryServer) -> None:
    older = put(server, b"a" * 1000, 1)
    newer = copy_of(b"b" * 1000, 2)
    with wire.connect(server.address) as connection:
        wire._ask(connection, server.address, "put", newer)
        connection.sendall(b"b" * 500)
        assert wire.list_copies(server.address) == [older]
    assert wire.list_copies(server.address) == [older]


def test_a_new_rank_takes_over_from_one_that_hangs(server: MemoryServer) -> None:
    hanging = wire.connect(server.address)
    wire._ask(hanging, server.address, "put", copy_of(b"b" * 1000, 2))
    hanging.sendall(b"b" * 500)
    deadline = time.monotonic() + 240
    while 7 not in server._writers:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    copy = put(server, b"c" * 1000, 3)
    assert wire.fetch(server.address, copy) == b"c" * 1000
    with pytest.raises(OSError):
        hanging.sendall(b"b" * 500)
        wire.receive(hanging)
    assert wire.list_copies(server.address) == [copy]
    hanging.close()


def test_what_a_rank_that_hangs_has_sent_does_not_reach_the_new_ones_copy(
    server: MemoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of the old connection stores what it had received only after the new one has taken over."""
    receive_into, delayed, stored = wire.receive_into, threading.Event(), threading.Event()

    def late(connection: socket.socket, buffer: memoryview) -> None:
        if len(buffer) != 1000 or delayed.is_set():
            return receive_into(connection, buffer)
        delayed.set()
        deadline = time.monotonic() + 240
        while server._writers[7] is connection and time.monotonic() < deadline:
            time.sleep(0.01)
        # Time for the new one to write, if nothing held it back.
        time.sleep(0.5)
        try:
            receive_into(connection, buffer)
        finally:
            stored.set()

    monkeypatch.setattr(wire, "receive_into", late)
    with wire.connect(server.address) as hanging:
        wire._ask(hanging, server.address, "put", copy_of(b"b" * 1000, 2))
        hanging.sendall(b"b" * 500)
        assert delayed.wait(240)
        copy = put(server, b"c" * 1000, 3)
        assert stored.wait(240)
        assert wire.fetch(server.address, copy) == b"c" * 1000
        assert wire.list_copies(server.address) == [copy]


def test_nothing_is_given_without_the_secret(server: MemoryServer) -> None:
    copy = put(server, b"a" * 1000, 1)
    foreign = "0" * 64 + "@" + wire.visible(server.address)
    with pytest.raises(OSError):
        wire.list_copies(foreign)
    with pytest.raises(OSError):
        wire.fetch(foreign, copy)
    with pytest.raises(OSError), wire.connect(foreign) as connection:
        wire.put(connection, foreign, replace(copy, step=2), memoryview(b"b" * 1000))
    assert wire.list_copies(server.address) == [copy]


def test_a_single_node_has_no_server() -> None:
    server = MemoryServer(1)
    assert server.address == "" and json.loads(server.environment()[MEMORY])["neighbour"] == ""
    server.close()


def test_without_a_launcher_nothing_keeps_copies() -> None:
    assert copy_location({"LOCAL_RANK": "0"}) is None
