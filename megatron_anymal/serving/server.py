"""The process that serves: its socket, and an end that lets running requests finish."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Optional

import uvicorn

from megatron_anymal.data.records import DataError
from megatron_anymal.serving.app import build_app
from megatron_anymal.serving.service import Service

# Bytes that the kernel holds for a client that does not read.
_SEND_BUFFER = 2**16
# Seconds for replies that are complete to be written, after the deadline.
_LAST_WRITES = 5


def listen(host: str, port: int, client_timeout: float) -> socket.socket:
    """Open the server's socket.

    Args:
        port: 0 takes a free one.
        client_timeout: seconds after which the kernel drops a connection whose peer reads nothing.

    Raises:
        DataError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit both.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * client_timeout))
        opened.bind((host, port))
    except (OSError, OverflowError) as error:
        raise DataError(f"--host={host} --port={port} cannot be used ({error}). Name others, or port 0.") from None
    return opened


class GracefulServer(uvicorn.Server):
    """Ends on SIGTERM or SIGINT once all requests are answered or a deadline passes; a second signal ends at once."""

    def __init__(self, service: Service, shutdown_seconds: float, ready: Callable[[], object]):
        """Prepare the server.

        Args:
            shutdown_seconds: for running requests to finish after the signal.
            ready: called once requests are accepted.
        """
        config = uvicorn.Config(
            build_app(service),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_WRITES,
        )
        super().__init__(config)
        self.should_exit = False
        self._service, self._seconds, self._ready = service, shutdown_seconds, ready
        self._deadline: Optional[float] = None

    def handle_exit(self, sig: int, frame: Optional[FrameType]) -> None:
        """Refuse new requests from now on; a second signal moves the deadline to now."""
        self._deadline = time.monotonic() + (0.0 if self._service.draining else self._seconds)
        self._service.draining = True

    async def startup(self, sockets: Any = None) -> None:
        """Accept requests."""
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Called every tenth of a second; returns whether to end."""
        if self._deadline is not None and not self.should_exit:
            late = time.monotonic() >= self._deadline
            if late or not self._service.in_flight:
                # Requests without an answer get an error, which is still sent.
                await asyncio.to_thread(self._service.close)
                self.should_exit = True
        return await super().on_tick(counter)
