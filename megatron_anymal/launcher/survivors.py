"""Ranks that keep their process from one attempt to the next, as the launcher and its agent see them.

When a rank is killed, the others are healthy. The launcher invites them to wait for the next attempt (rejoining.py has
their side); each that does has a socket, and takes from it what the standby process would get to fork a rank. Whoever
does not wait in time is ended and replaced, so nothing depends on a rank that stays.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Optional

from megatron_anymal.processes.child_processes import end_group
from megatron_anymal.resilience.survival import ENVIRONMENT, invitation

_WAITING = "waiting_"


class Survivors:
    """The ranks of a node that wait for the next attempt.

    Args:
        folder: for invitations and sockets; outlives the attempts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def invite(self, attempt: int) -> None:
        """Ask the ranks of an attempt to stay; each accepts only an invitation with its own attempt's number."""
        invitation(self.folder, attempt).touch()

    def waiting(self) -> dict[int, int]:
        """Rank -> process ID of those that wait."""
        return {rank: pid for rank, (pid, _) in _sockets(self.folder).items()}

    def dismiss(self, but: Collection[int] = ()) -> None:
        """End those that still wait, except these process IDs."""
        for pid, path in _sockets(self.folder).values():
            if pid not in but:
                path.unlink(missing_ok=True)
                end_group(pid)


def socket_of(folder: Path, rank: int, pid: int) -> Path:
    """Socket of a rank that waits."""
    return folder / f"{_WAITING}{rank}_{pid}"


def socket_for(environment: Mapping[str, str]) -> Optional[Path]:
    """Socket of the process that had the rank of an environment before; None if none waits."""
    folder, rank = environment.get(ENVIRONMENT), environment.get("RANK")
    if not folder or rank is None:
        return None
    _, path = _sockets(Path(folder)).get(int(rank), (0, None))
    return path


def _sockets(folder: Path) -> dict[int, tuple[int, Path]]:
    sockets = {}
    with suppress(OSError):
        for name in os.listdir(folder):
            rank, _, pid = name.removeprefix(_WAITING).partition("_")
            # The socket of a process that was killed is still there.
            if name.startswith(_WAITING) and rank.isdigit() and pid.isdigit() and Path(f"/proc/{pid}").exists():
                sockets[int(rank)] = (int(pid), folder / name)
    return sockets
