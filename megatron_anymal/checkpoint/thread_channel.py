"""Messages between the background threads of different ranks.

They go through the job's key-value store, which torch.distributed keeps anyway, rather than through collectives. Those
belong to the main threads, whose order a background thread must not disturb, and a failed rank would leave the others
waiting in them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

# First and longest interval between two polls, in seconds.
_FIRST_LOOK, _LAST_LOOK = 0.002, 0.5


class Channel:
    """Named messages that all ranks can read; each name is written once, by one rank.

    Args:
        prefix: prefix of the names.
    """

    def __init__(self, prefix: str) -> None:
        self._store: Store = PrefixStore(f"megatron_anymal/{prefix}", _get_default_store())

    def post(self, name: str, message: str) -> None:
        """Post a message."""
        self._store.set(name, message)

    def wait(self, names: Sequence[str], seconds: float) -> list[bytes]:
        """Wait for the messages with these names and return them.

        Raises:
            TimeoutError: some did not arrive in time; the message names them.
        """
        deadline, pause = time.monotonic() + seconds, _FIRST_LOOK
        # Poll: the store's own wait would block this process's connection, which the main thread needs.
        while not self._store.check(list(names)):
            if time.monotonic() > deadline:
                missing = [name for name in names if not self._store.check([name])]
                raise TimeoutError(f"no message from {', '.join(missing[:5])} in {seconds:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)
        return [self._store.get(name) for name in names]

    def forget(self, names: Sequence[str]) -> None:
        """Delete messages that nobody will read again."""
        for name in names:
            self._store.delete_key(name)
