"""Byte ranges of shards on a local disk, read from descriptors that stay open."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict

from megatron_anymal.data.tar.byte_source import LocalBytes

# Shards of all folders that a thread keeps open. A process usually has 1,024 descriptors, and loader workers need some
# for shared memory.
MOST_OPEN = 256


class _OpenShards(threading.local):
    """This thread's open shards by (number of their `ShardFiles`, name), least recently used first."""

    def __init__(self) -> None:
        self.shards: OrderedDict[tuple[int, str], _Shard] = OrderedDict()


_OPENED = _OpenShards()
_NUMBERS = itertools.count()


class ShardFiles:
    """Reads from a folder's local shards; those read last stay open.

    Descriptors are read by position (pread), so that processes forked from this one can share them. Each thread has its
    own, so that none closes a descriptor that another is reading.
    """

    def __init__(self, folder: str, most: int = MOST_OPEN):
        self._folder, self._most, self._number = folder, most, next(_NUMBERS)
        weakref.finalize(self, _close, self._number).atexit = False

    def read(self, name: str, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length) of a shard, fewer if it ends before.

        Raises:
            OSError: it cannot be read.
        """
        opened, key = _OPENED.shards, (self._number, name)
        shard = opened.get(key)
        if shard is None:
            shard = opened[key] = _Shard(os.open(os.path.join(self._folder, name), os.O_RDONLY))
            while len(opened) > self._most:
                opened.popitem(last=False)
        opened.move_to_end(key)
        try:
            return shard.read_exactly(offset, length)
        except OSError:
            # Such as a stale handle of a network file system: the next read opens the shard again.
            del opened[key]
            raise


def _close(number: int) -> None:
    for key in [key for key in _OPENED.shards if key[0] == number]:
        del _OPENED.shards[key]


class _Shard(LocalBytes):
    """A shard that is closed with its last reference."""

    def __del__(self) -> None:
        os.close(self._descriptor)
