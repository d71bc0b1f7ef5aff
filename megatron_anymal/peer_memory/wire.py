"""Messages between ranks and the memory servers of nodes: a length, a JSON header, and bytes.

A server's address has the form SECRET@HOST:PORT. Requests carry the secret, so that nothing else on the network can
read or overwrite a rank's state.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import asdict
from typing import Any, Optional

from megatron_anymal.peer_memory.slots import Copy, parse_copy

_LENGTH = struct.Struct("!I")
# Longest header, in bytes: a listing of some thousand copies.
_LONGEST = 1 << 22
# Seconds without progress after which a peer counts as gone.
TIMEOUT = 30.0


def send(connection: socket.socket, header: dict[str, Any], data: Optional[memoryview] = None) -> None:
    """Send a message.

    Raises:
        OSError: the connection is gone.
    """
    text = json.dumps(header).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)
    if data is not None:
        connection.sendall(data)


def receive(connection: socket.socket) -> dict[str, Any]:
    """Receive the header of a message.

    Raises:
        OSError: the connection is gone, or its other end is not one of this protocol.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > _LONGEST:
        raise ConnectionError(f"a header of {length} bytes")
    try:
        header = json.loads(_exactly(connection, length))
    except ValueError as error:
        raise ConnectionError(f"an unreadable header ({error})") from None
    if not isinstance(header, dict):
        raise ConnectionError("the header is not a JSON object")
    return header


def receive_into(connection: socket.socket, buffer: memoryview) -> None:
    """Fill a buffer with the bytes that follow a header.

    Raises:
        OSError: the connection is gone.
    """
    while buffer:
        count = connection.recv_into(buffer)
        if not count:
            raise ConnectionError("the other end has closed the connection")
        buffer = buffer[count:]


def visible(address: str) -> str:
    """HOST:PORT of an address."""
    return address.rpartition("@")[2]


def connect(address: str) -> socket.socket:
    """Connect to a server.

    Raises:
        OSError: nothing answers there.
    """
    host, _, port = visible(address).rpartition(":")
    connection = socket.create_connection((host, int(port)), TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def put(connection: socket.socket, address: str, copy: Copy, data: memoryview) -> None:
    """Have a server keep a copy, over a connection that is used for all copies of a rank.

    Raises:
        OSError: the connection is gone, or the server has no memory.
    """
    _ask(connection, address, "put", copy)
    connection.sendall(data)
    if not receive(connection).get("taken"):
        raise ConnectionError("it has not enough memory")


def list_copies(address: str) -> list[Copy]:
    """All copies that a node holds.

    Raises:
        OSError: the node does not answer.
    """
    with connect(address) as connection:
        _ask(connection, address, "list")
        return [parse_copy(fields) for fields in receive(connection)["copies"]]


def fetch(address: str, copy: Copy) -> bytearray:
    """Get the bytes of a copy from the node that holds it.

    Raises:
        OSError: the node does not answer, or no longer has the copy.
    """
    with connect(address) as connection:
        _ask(connection, address, "get", copy)
        if not receive(connection).get("found"):
            raise ConnectionError(f"{visible(address)} no longer has rank {copy.rank}'s copy of step {copy.step}")
        data = bytearray(copy.size)
        receive_into(connection, memoryview(data))
        return data


def _ask(connection: socket.socket, address: str, ask: str, copy: Optional[Copy] = None) -> None:
    send(connection, {"secret": address.rpartition("@")[0], "ask": ask, "copy": asdict(copy) if copy else None})


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    receive_into(connection, memoryview(data))
    return bytes(data)
