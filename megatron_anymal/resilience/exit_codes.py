"""What a process's exit code says, and which exception ends it with which."""

from __future__ import annotations

import sys
from enum import IntEnum

# Mistakes of the user: reported in one line, without a traceback.
USER_ERRORS = (
    ("megatron_anymal.config", "ConfigError"),
    ("megatron_anymal.data.records", "DataError"),
    ("megatron_anymal.modalities.base", "MediaError"),
    ("megatron_anymal.checkpoint.store", "CheckpointError"),
)


class Exit(IntEnum):
    """Exit codes of `anymal`; `anymal launch` ends with that of its ranks, or with one of its own."""

    DONE = 0
    CRASH = 1
    MISTAKE = 2
    REQUEUE = 75
    HANG = 76
    NOT_FINITE = 77
    NO_CHECKPOINT = 78
    CRASH_LOOP = 79
    LOCKED = 80
    SAVE_FAILED = 81

    @property
    def meaning(self) -> str:
        """One line for people."""
        return _MEANINGS[self]

    @property
    def restarts(self) -> bool:
        """Whether starting the run again by itself may help."""
        return self in (Exit.CRASH, Exit.HANG)


_MEANINGS = {
    Exit.DONE: "the run is complete",
    Exit.CRASH: "it failed for another reason",
    Exit.MISTAKE: "a setting, data or a checkpoint that cannot be used: starting again will not help",
    Exit.REQUEUE: "stopped on request or out of time, its checkpoint is committed: start it again to go on",
    Exit.HANG: "a process made no progress and all were ended",
    Exit.NOT_FINITE: "too many steps in a row without a finite gradient",
    Exit.NO_CHECKPOINT: "there are checkpoints and none is valid",
    Exit.CRASH_LOOP: "started again several times without progress",
    Exit.LOCKED: "another job works in the run's folder",
    Exit.SAVE_FAILED: "the last checkpoint could not be written",
}


def is_users(error: BaseException) -> bool:
    """Whether it is a mistake of the user, told in one line."""
    # A module not loaded cannot have raised: nothing is imported to find out.
    classes = [getattr(sys.modules.get(module), name, None) for module, name in USER_ERRORS]
    return isinstance(error, tuple(c for c in classes if c is not None))


def code_of(error: BaseException) -> Exit:
    """The exit code of a process that this exception ends; some classes carry theirs as `exit_code`."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        return Exit(code)
    return Exit.MISTAKE if is_users(error) else Exit.CRASH
