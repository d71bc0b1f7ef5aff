"""Whether the ranks of a job may outlive it: they stay for the next attempt when another rank is killed."""

from __future__ import annotations

import os
from pathlib import Path

# Environment variable of ranks that may stay, set by the launcher: the folder with invitations and sockets.
ENVIRONMENT = "ANYMAL_SURVIVORS"


def may_stay() -> bool:
    """Whether this process may stay for another attempt."""
    return ENVIRONMENT in os.environ


def invitation(folder: Path, attempt: int) -> Path:
    """File whose existence invites the ranks of an attempt to stay."""
    return folder / f"stay_{attempt}"
