"""A process that keeps a node's copies in memory for a while after its launcher was killed.

On several nodes the next node has copies too; on a single one, memory would end with the launcher. The keeper holds the
same files in memory. If the launcher ends as it should, the keeper ends with it; if it is killed, the next launcher of
the run, on the same machine and within LINGER seconds, gets the files from it. The name of its socket follows from a
secret in the run's folder, so that only that run's launcher finds it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Optional

# Seconds for which the memory outlives a launcher that was killed.
LINGER = 60.0
# File in the run's folder with the secret.
KEY = ".memory_key"
# Files that one message can carry.
_MOST = 128
# Seconds to wait for a keeper's answer.
_ANSWER = 5.0
_DONE = b"done"
# Process ID, user and group of the other end of a socket (SO_PEERCRED).
_CREDENTIALS = struct.Struct("3i")


class NoKeeper(Exception):
    """There can be no keeper; the text says why."""


def adopt(run_dir: Path, count: int) -> Optional[tuple[list[int], socket.socket]]:
    """Take over the files of a launcher of this run that was killed.

    Args:
        count: number of files wanted; a keeper with another number of files is asked to end.

    Returns:
        Their descriptors and the connection to the keeper; None if there is nothing to take over.
    """
    with suppress(OSError):
        key = (run_dir / KEY).read_text()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(_ANSWER)
        try:
            connection.connect(_address(key))
            _, files, _, _ = socket.recv_fds(connection, 16, _MOST)
            if len(files) == count:
                return files, connection
            for file in files:
                os.close(file)
            # Without files, the keeper has a launcher already.
            if files:
                connection.send(_DONE)
        except OSError:
            connection.close()
            raise
        connection.close()
    return None


def start(run_dir: Path, files: Sequence[int]) -> socket.socket:
    """Start a keeper of files; return the connection to it.

    Raises:
        NoKeeper: there are too many files, the run's folder cannot be written, or the process does not start.
    """
    if len(files) > _MOST:
        raise NoKeeper(f"a keeper takes the copies of {_MOST} ranks on a node, not of {len(files)}")
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with its:
            _start(run_dir, [its.fileno(), *files])
    except (OSError, subprocess.SubprocessError) as error:
        mine.close()
        raise NoKeeper(str(error) if isinstance(error, OSError) else "its process did not start") from error
    return mine


def _start(run_dir: Path, passed: Sequence[int]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    key = secrets.token_hex()
    part = run_dir / f"{KEY}.part"
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(key)
    part.replace(run_dir / KEY)
    # The key is not shown by ps.
    subprocess.run(
        [sys.executable, "-m", __name__, *map(str, passed)],
        input=key.encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=passed,
        check=True,
        timeout=60,
    )


def end(connection: socket.socket) -> None:
    """End the keeper, which frees the memory once nobody else has it open."""
    with connection, suppress(OSError):
        connection.send(_DONE)


def main(arguments: Sequence[str]) -> int:
    """Keep files until they are no longer needed.

    Args:
        arguments: descriptors of the launcher's connection and of the files; the key is read from standard input.
    """
    owner: Optional[socket.socket] = socket.socket(fileno=int(arguments[0]))
    files = list(map(int, arguments[1:]))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(_address(sys.stdin.read()))
    listener.listen()
    # No child of the launcher: what kills that with all its children leaves this process.
    if os.fork():
        return 0
    _detach()
    deadline = 0.0
    while True:
        left = None if owner else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([listener, *([owner] if owner else [])], [], [], left)
        if not ready:
            return 0
        if owner in ready:
            assert owner is not None
            if _received(owner) == _DONE:
                return 0
            owner.close()
            owner, deadline = None, time.monotonic() + LINGER
        elif listener in ready:
            owner = _hand_over(listener.accept()[0], files, taken=owner is not None) or owner


def _detach() -> None:
    """Leave the launcher's session, terminal and folder."""
    os.setsid()
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)


def _received(owner: socket.socket) -> bytes:
    """What the launcher says: done, or nothing at all if it was killed."""
    with suppress(OSError):
        return owner.recv(len(_DONE))
    return b""


def _hand_over(connection: socket.socket, files: Sequence[int], *, taken: bool) -> Optional[socket.socket]:
    """Give the files to a launcher of the same user, unless another one has them; return the connection if so."""
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if not taken and user == os.getuid():
        with suppress(OSError):
            socket.send_fds(connection, [b"files"], files)
            return connection
    connection.close()
    return None


def _address(key: str) -> str:
    """Name of the keeper's socket, in the kernel's own name space, where nothing is left behind."""
    return f"\0anymal-memory-{hashlib.sha256(key.encode()).hexdigest()}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
