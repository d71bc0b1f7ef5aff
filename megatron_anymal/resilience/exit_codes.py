"""Exit codes of processes, their meaning, and the exceptions that lead to them."""

from __future__ import annotations

import sys
from enum import IntEnum

# User errors: reported in one line, without a traceback.
USER_ERRORS = (
    ("megatron_anymal.config", "ConfigError"),
    ("megatron_anymal.data.records", "DataError"),
    ("megatron_anymal.modalities.base", "MediaError"),
    ("megatron_anymal.checkpoint.store", "CheckpointError"),
    ("megatron_anymal.object_storage.errors", "StorageError"),
)


class Exit(IntEnum):
    """Exit codes of `anymal`; `anymal launch` returns that of its ranks or its own."""

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
        """One-line description for the user."""
        return _MEANINGS[self]

    @property
    def restarts(self) -> bool:
        """Whether the launcher restarts the run automatically."""
        return self in (Exit.CRASH, Exit.HANG)


_MEANINGS = {
    Exit.DONE: "the run is complete",
    Exit.CRASH: "it failed for another reason",
    Exit.MISTAKE: "a setting, data or a checkpoint cannot be used; restarting will not help",
    Exit.REQUEUE: "stopped on request or at its time limit, with a checkpoint; start it again to continue",
    Exit.HANG: "a process made no progress and all were ended",
    Exit.NOT_FINITE: "too many steps in a row without a finite gradient",
    Exit.NO_CHECKPOINT: "there are checkpoints, but none is valid",
    Exit.CRASH_LOOP: "restarted several times without progress",
    Exit.LOCKED: "another job is using the run's folder",
    Exit.SAVE_FAILED: "the last checkpoint could not be written",
}


def is_users(error: BaseException) -> bool:
    """Whether an exception is a user error, which is reported in one line."""
    # A module that is not loaded cannot have raised it, so nothing needs to be imported.
    classes = [getattr(sys.modules.get(module), name, None) for module, name in USER_ERRORS]
    return isinstance(error, tuple(c for c in classes if c is not None))


def code_of(error: BaseException) -> Exit:
    """Exit code of a process that ends with this exception; some classes define theirs as `exit_code`."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        return Exit(code)
    return Exit.MISTAKE if is_users(error) else Exit.CRASH
