"""Keys that occur in several shards, found in bounded memory: hashes wait in files, and are sorted share by share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Optional

import numpy as np

from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.shard_rows import HASH, ShardRows, repeated

# Hashes that are in memory together: 32 MB, and as much for sorting.
HASHES_AT_ONCE = 4_000_000
# Maximum number of shards that a note names.
_NAMED = 4


class KeyHashes:
    """The hashes of all keys of a folder."""

    def __init__(self, files: list[IO[bytes]]):
        """Start with empty files, one for each share of the range of hashes; their number is a power of two."""
        self._files = files
        self._shift = HASH.itemsize * 8 - (len(files).bit_length() - 1)

    def add(self, hashes: np.ndarray) -> None:
        """Store hashes.

        Args:
            hashes: [n] HASH.
        """
        if len(self._files) == 1:
            self._files[0].write(hashes.tobytes())
            return
        ordered = np.sort(hashes)
        starts = np.searchsorted(ordered >> np.uint64(self._shift), np.arange(1, len(self._files)))
        for file, some in zip(self._files, np.split(ordered, starts)):
            file.write(some.tobytes())

    def repeated(self) -> np.ndarray:
        """The hashes that occur more than once, [k] HASH in ascending order."""
        hashes = [np.zeros(0, HASH)]
        for file in self._files:
            file.seek(0)
            hashes.append(repeated(np.fromfile(file, HASH)))
        return np.concatenate(hashes)


@contextmanager
def open_hashes(samples: int, folder: Optional[str]) -> Iterator[KeyHashes]:
    """Room for the hashes of `samples` keys in unnamed files, in a local folder (None: that of temporary files)."""
    shares = 1
    while shares * HASHES_AT_ONCE < samples:
        shares *= 2
    with ExitStack() as stack:
        yield KeyHashes([stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(shares)])


def repeated_keys(hashes: np.ndarray, shards: Iterable[ShardRows]) -> list[LeftOut]:
    """Ledger notes for keys that occur in several shards, in the order in which they occur first.

    Args:
        hashes: [k] HASH in ascending order: those that occur more than once; their keys are compared.
        shards: the rows of all shards.
    """
    if not len(hashes):
        return []
    # Number of shards and names of the first ones.
    by_key: dict[str, tuple[int, list[str]]] = {}
    for rows in shards:
        own = rows.key_hashes()
        nearest = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
        for number in np.flatnonzero(hashes[nearest] == own).tolist():
            key = rows.key(number)
            count, names = by_key.get(key, (0, []))
            by_key[key] = count + 1, names if count >= _NAMED else [*names, rows.name]
    return [
        LeftOut(names[0], "repeated_key", f"the key occurs in {count} shards: {', '.join(names)}", key=key)
        for key, (count, names) in by_key.items()
        if count > 1
    ]
