"""Key-value cache for generation: every layer keeps the keys and values of the documents that are being continued.

The first pass computes whole documents with the ordinary attention kernel and stores their keys and values; each later
pass has one new token per document, which attends to everything stored. Both are attention kernels as in
attention_kernels.py, so the layers do not know about the cache.

Shapes: R documents, L tokens of the longest, n heads, g key/value groups, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_anymal.model.attention import DocumentPack, document_pack, rotation
from megatron_anymal.model.attention_kernels import Attend, PackedDocuments, SdpaKernel

# Tokens by which a full cache grows.
_GROWTH = 64


class KeyValueCache:
    """The keys and values of R documents, in every layer of this rank's pipeline stage."""

    def __init__(self, documents: int):
        # Tokens of each document that have been computed.
        self.lengths = [0] * documents
        # Key and value of each layer, [R, g, at least L, d], keys rotated to their positions.
        self._layers: list[tuple[Tensor, Tensor]] = []

    @property
    def is_empty(self) -> bool:
        """Whether no pass has been computed; the next one then takes whole documents instead of one token each."""
        return not any(self.lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all documents except those with these numbers, which keep their order."""
        self.lengths = [self.lengths[row] for row in rows]
        index, size = torch.tensor(rows, dtype=torch.int64), max(self.lengths, default=0) + _GROWTH
        self._layers = [
            (
                key[:, :, :size].index_select(0, index.to(key.device)),
                value[:, :, :size].index_select(0, index.to(value.device)),
            )
            for key, value in self._layers
        ]

    def append(self, other: KeyValueCache) -> None:
        """Add the documents of another cache after these. `other` must not be used any more."""
        if self._layers:
            pairs = zip(self._layers, other._layers)
            self._layers = [(_stacked(key, k), _stacked(value, v)) for (key, value), (k, v) in pairs]
        else:
            self._layers = other._layers
        self.lengths = self.lengths + other.lengths

    def last_tokens(self, lengths: Sequence[int]) -> Tensor:
        """[R] int64: position of each document's last token in a pass over documents of these lengths."""
        return torch.tensor(lengths).cumsum(0)[: len(self.lengths)] - 1

    def pack(self, lengths: Sequence[int], device: torch.device, inv_freq: Tensor, attention: str) -> DocumentPack:
        """Describe the next pass, whose keys and values are added to the cache. Used for one pass only.

        Args:
            lengths: tokens of each document in this pass, then those of documents that only pad it.
            inv_freq: [d / 2], see `attention.rotation`.
            attention: as in `attention.document_pack`. Transformer Engine's attention, which does not use this cache,
                and flex attention, which would be recompiled for each length, are replaced by scaled dot-product
                attention.

        Raises:
            DataError: as `attention.document_pack`.
        """
        documents = len(self.lengths)
        if self.is_empty:
            pack = document_pack(lengths, device, inv_freq, "sdpa" if attention == "flex" else attention)
            kernel = pack.kernel or SdpaKernel(PackedDocuments(lengths), device)
            pack.kernel = _Storing(kernel, self._layers, lengths[:documents])
        else:
            assert all(length == 1 for length in lengths[:documents])
            positions = torch.tensor(self.lengths, device=device)
            padding = positions.new_zeros(sum(lengths[documents:]))
            pack = DocumentPack(
                qkv_format="thd" if attention == "transformer_engine" else "sbhd",
                max_seqlen_q=1,
                max_seqlen_kv=1,
                rotation=rotation(torch.cat([positions, padding]), inv_freq),
                kernel=_Continuing(self._layers, positions, max(self.lengths)),
            )
        self.lengths = [before + new for before, new in zip(self.lengths, lengths)]
        return pack


def _stacked(one: Tensor, two: Tensor) -> Tensor:
    """Keys or values [R, g, size, d] of two groups of documents -> [sum of R, g, larger size, d]."""
    size = max(one.size(2), two.size(2))
    return torch.cat([F.pad(tensor, (0, 0, 0, size - tensor.size(2))) for tensor in (one, two)])


class _Storing:
    """Another kernel, which keeps the documents' keys and values of every layer."""

    def __init__(self, kernel: Attend, layers: list[tuple[Tensor, Tensor]], lengths: Sequence[int]):
        self._kernel, self._layers, self._lengths = kernel, layers, list(lengths)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: Optional[float]) -> Tensor:
        """query [Q, n, d], key and value [Q, g, d] -> [Q, n, d]."""
        self._layers.append((self._by_document(key), self._by_document(value)))
        return self._kernel(query, key, value, scale)

    def _by_document(self, tokens: Tensor) -> Tensor:
        """[Q, g, d] -> [R, g, L + room for new tokens, d]."""
        documents = tokens[: sum(self._lengths)].split(self._lengths)
        padded = pad_sequence(list(documents), batch_first=True).transpose(1, 2)
        return F.pad(padded, (0, 0, 0, _GROWTH))


class _Continuing:
    """Attention of one new token per document to all its tokens. Called once per layer, in order."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], positions: Tensor, longest: int):
        self._layers, self._positions, self._size = layers, positions, longest + 1
        self._rows = torch.arange(len(positions), device=positions.device)
        # [R, 1, 1, L] bool.
        sees = torch.arange(self._size, device=positions.device) <= positions[:, None]
        self._mask = sees[:, None, None]
        self._next = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: Optional[float]) -> Tensor:
        """query [Q, n, d], key and value [Q, g, d]; tokens after the R documents' are padding -> [Q, n, d]."""
        documents = len(self._rows)
        keys, values = (self._added(*pair) for pair in zip(self._layers[self._next], (key, value)))
        self._layers[self._next] = keys, values
        self._next += 1
        attended = F.scaled_dot_product_attention(
            query[:documents, :, None],
            keys[:, :, : self._size],
            values[:, :, : self._size],
            attn_mask=self._mask,
            scale=scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return F.pad(attended[:, :, 0], (0, 0, 0, 0, 0, len(query) - documents))

    def _added(self, stored: Tensor, new: Tensor) -> Tensor:
        """Write the new tokens [Q, g, d] into a layer's keys or values [R, g, at least L, d]."""
        if stored.size(2) < self._size:
            stored = F.pad(stored, (0, 0, 0, _GROWTH))
        stored[self._rows, :, self._positions] = new[: len(self._rows)]
        return stored
