"""Objects that Python's cycle collector leaves out as long as the process lives."""

from __future__ import annotations

import gc

_frozen = False


def freeze() -> None:
    """Leave out all objects that exist now. What they were part of must not be unfrozen: see `are_frozen`."""
    global _frozen
    gc.freeze()
    _frozen = True


def are_frozen() -> bool:
    """Whether `freeze` was called, in this process or in one that it was forked from.

    `gc.get_freeze_count` visits each object (50 ms for a rank's 700,000), and counts those that Python 3.12 leaves out
    when it starts.
    """
    return _frozen
