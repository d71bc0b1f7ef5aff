"""Memory usage of a conversion."""

from __future__ import annotations


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
