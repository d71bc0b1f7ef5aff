"""Disk-space checks and disk error messages for conversions."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from megatron_anymal.config import ConfigError


def check_space(out: Path, needed: int) -> None:
    """Check that the disk has enough free space for an output.

    Args:
        out: path to be written; its parent folder exists.
        needed: bytes.

    Raises:
        ConfigError: not enough space; names the disk, the bytes needed and the bytes free.
    """
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ConfigError(
            f"--out needs {needed / 1e9:.2f} GB on the disk of {str(out.parent)!r}, which has {free / 1e9:.2f} GB free."
            " Free up space, or choose another location."
        )


def what_failed(error: OSError, out: Path, then: str) -> str:
    """Format an OSError as one line for the user.

    Args:
        out: path that was being written.
        then: advice to add if the disk is full.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of --out={str(out)!r} is full. {then}"
    return f"{error.filename or str(out)!r}: {error.strerror or error}"
