"""The disk that a conversion writes to: whether there is room, and what is said where it fails."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from megatron_anymal.config import ConfigError


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin where there is no room.

    Args:
        out: what will be written; the folder it will lie in exists.
        needed: bytes.

    Raises:
        ConfigError: naming the disk, what is needed and what is free.
    """
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ConfigError(
            f"--out needs {needed / 1e9:.2f} GB on the disk of {str(out.parent)!r}, which has {free / 1e9:.2f} GB free."
            " Free space, or name another place."
        )


def what_failed(error: OSError, out: Path, then: str) -> str:
    """An error of the system as a line for the user.

    Args:
        out: what was being written.
        then: what the user can do where the disk is full.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of --out={str(out)!r} is full. {then}"
    return f"{error.filename or str(out)!r}: {error.strerror or error}"
