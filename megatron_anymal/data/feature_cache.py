"""Cached features of media pieces, on a node's local disk.

An entry holds the features of one piece. Its key is a hash of everything that they depend on: the content of the media
file (SHA-256: the index's CRC-32 would confuse files of the same length once there are some ten thousand of them), how
its bytes are read, and the encoder's identity (model/encoder_identity.py). Entries are blocks of a `BlockCache`, which
limits their size, removes the least recently used ones, and survives writers that are killed.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_anymal.data.shard_index import MediaBytes
from megatron_anymal.object_storage.block_cache import BlockCache, CachedObject

# Bytes of the checksum that follows the features.
_CHECKSUM = 4


@dataclass(frozen=True)
class PieceKey:
    """Identifies a piece, whatever encodes it."""

    # Hash of the media file and of how it is read; see `item_digest`.
    item: str
    # Number of the item's pieces.
    pieces: int
    # Number of this one.
    number: int


def item_digest(media: MediaBytes) -> str:
    """Hash of a media file's content and of what else its decoding depends on."""
    attributes = json.dumps(dict(media.part.attributes), sort_keys=True, default=repr)
    digest = hashlib.sha256(f"{media.extension}\n{attributes}\n".encode())
    digest.update(media.data)
    return digest.hexdigest()


class FeatureCache:
    """The cached features of one encoder.

    Args:
        folder: folder of the cache, see `object_storage.cache_folder`.
        limit: largest size of all features in the folder, in bytes.
        identity: hash of the encoder and of what prepares its input.
        shape: shape of a piece's features, [feature tokens, width].
        dtype: their dtype.
    """

    def __init__(self, folder: Path, limit: int, identity: str, shape: tuple[int, int], dtype: torch.dtype):
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self._identity = f"{identity}/{'x'.join(map(str, shape))}/{dtype}"
        self._features = math.prod(shape) * dtype.itemsize
        self._blocks = BlockCache(folder, limit, self.entry_bytes)

    @property
    def entry_bytes(self) -> int:
        """Size of an entry on the disk."""
        return self._features + _CHECKSUM

    def holds(self, key: PieceKey) -> bool:
        """Whether there is an entry, which may be damaged. This is not a use of it."""
        return self._blocks.holds(self._item(key), key.number)

    def read(self, key: PieceKey, out: Tensor) -> bool:
        """Read a piece's features. A damaged entry is removed.

        Args:
            out: [feature tokens, width] on the CPU, contiguous; receives the features.

        Returns:
            Whether they were in the cache; otherwise `out` is unchanged.
        """
        item, size = self._item(key), self.entry_bytes
        entry = self._blocks.read(item, key.number, key.number * size, (key.number + 1) * size)
        if entry is None:
            return False
        features = memoryview(entry)[: self._features]
        if entry[self._features :] != self._checksum(key, features):
            self._blocks.drop(item, [key.number])
            return False
        _bytes_of(out)[...] = np.frombuffer(features, np.uint8)
        return True

    def add(self, key: PieceKey, features: Tensor) -> None:
        """Store a piece's features, unless there is an entry.

        Args:
            features: [feature tokens, width] on the CPU, contiguous.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        assert features.shape == self.shape and features.dtype == self.dtype
        if not self.holds(key):
            data = _bytes_of(features).tobytes()
            self._blocks.add(self._item(key), key.number, data + self._checksum(key, data))

    def _item(self, key: PieceKey) -> CachedObject:
        return self._blocks.object(f"{self._identity}/{key.item}", key.pieces * self.entry_bytes)

    def _checksum(self, key: PieceKey, features: bytes | memoryview) -> bytes:
        """CRC-32 of the key and the features, so that an entry under another's name counts as damaged, too."""
        start = zlib.crc32(f"{self._identity}/{key.item}/{key.number}".encode())
        return zlib.crc32(features, start).to_bytes(_CHECKSUM, "little")


def _bytes_of(features: Tensor) -> np.ndarray:
    return features.view(-1).view(torch.uint8).numpy()
