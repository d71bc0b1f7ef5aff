"""Free TCP ports that stay free until a test listens on them."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

# Range of the ports that the system gives to client sockets; one it gave out may be taken again at any time.
_CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 15_000
# A process that drew port N holds a lock on byte N of this file until it ends. A rank listens a while after its port
# was drawn, and other tests on this machine draw ports meanwhile.
_DRAWN = Path(tempfile.gettempdir()) / f"megatron_anymal_test_ports_{os.getuid()}"
_drawn_here: set[int] = set()
_lock_file: dict[int, int] = {}


def free_ports(count: int) -> list[int]:
    """Different ports, below the range of client sockets, that nothing listens on and no running process has drawn."""
    highest = int(_CLIENTS.read_text().split()[0]) if _CLIENTS.is_file() else 32_768
    draws = random.SystemRandom()
    ports: list[int] = []
    while len(ports) < count:
        port = draws.randrange(_LOWEST, highest)
        if _reserve(port):
            with socket.socket() as listener:
                try:
                    listener.bind(("127.0.0.1", port))
                except OSError:
                    continue
            ports.append(port)
    return ports


def free_port() -> int:
    """A port that nothing listens on and no running process has drawn."""
    [port] = free_ports(1)
    return port


def _reserve(port: int) -> bool:
    """Lock the port's byte; False if this process or another one has it."""
    # By process: a fork inherits the descriptor but neither the locks nor the obligation to keep away from the ports.
    if os.getpid() not in _lock_file:
        _lock_file.clear()
        _drawn_here.clear()
        _lock_file[os.getpid()] = os.open(_DRAWN, os.O_RDWR | os.O_CREAT, 0o600)
    if port in _drawn_here:
        return False
    try:
        fcntl.lockf(_lock_file[os.getpid()], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    _drawn_here.add(port)
    return True
