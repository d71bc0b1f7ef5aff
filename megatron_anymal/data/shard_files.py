"""Byte ranges of shards on a local disk, read from descriptors that stay open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

from megatron_anymal.data.tar.byte_source import LocalBytes

# Shards that an index keeps open per thread. A run may have dozens of indexes, and a process usually 1,024 descriptors.
MOST_OPEN = 16


class ShardFiles(threading.local):
    """Reads from local shards; those read last stay open.

    Descriptors are read by position (pread), so that processes forked from this one can share them. Each thread has its
    own, so that none closes a descriptor that another is reading.
    """

    def __init__(self, folder: str, most: int = MOST_OPEN):
        self._folder, self._most = folder, most
        # Least recently used first.
        self._opened: OrderedDict[str, _Shard] = OrderedDict()

    def read(self, name: str, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length) of a shard, fewer if it ends before.

        Raises:
            OSError: it cannot be read.
        """
        shard = self._opened.get(name)
        if shard is None:
            shard = self._opened[name] = _Shard(os.open(os.path.join(self._folder, name), os.O_RDONLY))
            if len(self._opened) > self._most:
                self._opened.popitem(last=False)
        self._opened.move_to_end(name)
        return shard.read_at(offset, length)


class _Shard(LocalBytes):
    """A shard that is closed with its last reference."""

    def __del__(self) -> None:
        os.close(self._descriptor)
