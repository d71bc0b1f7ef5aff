"""Ports for tests are free, different, and out of reach of client sockets."""

from __future__ import annotations

import socket
from pathlib import Path

import ports as drawn
from ports import free_ports
from ranks import run_ranks


def test_free_ports() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 < port < first_of_clients for port in ports)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        # What this test defends against: the system gives out ports of this range by itself.
        assert client.getsockname()[1] >= first_of_clients
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass


def drawable(ports: list[int]) -> list[int]:
    """In another process: those of the ports that it could draw."""
    return [port for port in ports if drawn._reserve(port)]


def test_another_process_never_draws_the_same() -> None:
    ports = free_ports(20)
    assert run_ranks(1, drawable, ports) == [[]]
    assert not any(drawn._reserve(port) for port in ports)
