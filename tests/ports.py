"""Free TCP ports that stay free until a test listens on them."""

from __future__ import annotations

import random
import socket
from pathlib import Path

# The system gives client sockets ports from this one on; a port it once gave out may be taken again at any time.
_CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 15_000


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on, below the range of client sockets.

    Drawn at random, so that tests that run at the same time rarely try the same one.
    """
    highest = int(_CLIENTS.read_text().split()[0]) if _CLIENTS.is_file() else 32_768
    draws = random.SystemRandom()
    ports: list[int] = []
    while len(ports) < count:
        port = draws.randrange(_LOWEST, highest)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def free_port() -> int:
    """A port that nothing listens on."""
    [port] = free_ports(1)
    return port
