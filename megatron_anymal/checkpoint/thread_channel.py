"""How background threads of different ranks tell each other things.

Through the job's key-value store, which torch.distributed keeps anyway, and not by collectives: those belong to the
main threads, whose order no background thread may disturb, and a rank that failed elsewhere would leave the others
waiting in them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

# Seconds between two looks, at first and at most.
_FIRST_LOOK, _LAST_LOOK = 0.002, 0.5


class Channel:
    """Messages under names; all ranks see them. One rank writes a name once.

    Args:
        prefix: of the names.
    """

    def __init__(self, prefix: str) -> None:
        self._store: Store = PrefixStore(f"megatron_anymal/{prefix}", _get_default_store())

    def post(self, name: str, message: str) -> None:
        """Leave a message."""
        self._store.set(name, message)

    def wait(self, names: Sequence[str], seconds: float) -> list[bytes]:
        """Messages of these names, once all are there.

        Raises:
            TimeoutError: naming those that are missing.
        """
        deadline, pause = time.monotonic() + seconds, _FIRST_LOOK
        # Its own way of waiting would lock this process's connection meanwhile, which the main thread needs.
        while not self._store.check(list(names)):
            if time.monotonic() > deadline:
                missing = [name for name in names if not self._store.check([name])]
                raise TimeoutError(f"no word of {', '.join(missing[:5])} in {seconds:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)
        return [self._store.get(name) for name in names]

    def forget(self, names: Sequence[str]) -> None:
        """Delete messages that nobody will read again."""
        for name in names:
            self._store.delete_key(name)
