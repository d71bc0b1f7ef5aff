"""A micro-batch with its contents: the input of one forward pass of one replica."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor

from megatron_anymal.data.feature_cache import PieceKey
from megatron_anymal.data.records import PackedPrompt, PlannedMicroBatch


@dataclass
class CachedFeatures:
    """Features of pieces that need no encoding, and where those of the others are stored."""

    # [h, feature tokens, width]: features from the cache, in the encoder's dtype.
    rows: Tensor
    # [h] int64: their positions among this rank's pieces.
    index: Tensor
    # [m] int64: positions of the pieces to encode among this rank's pieces.
    missing: Tensor
    # Keys under which the features of the pieces to encode are to be stored, [m]; None for a piece of zeros.
    keys: tuple[Optional[PieceKey], ...]

    def with_encoded(self, encoded: Tensor) -> Tensor:
        """The features of all pieces in order, [h + m, feature tokens, width].

        Args:
            encoded: [m, feature tokens, width], of the dtype and device of `rows`.
        """
        if not len(self.rows) or not len(encoded):
            return encoded if len(encoded) else self.rows
        whole = encoded.new_empty(len(self.index) + len(self.missing), *encoded.shape[1:])
        whole[self.index], whole[self.missing] = self.rows, encoded
        return whole


@dataclass
class MediaBatch:
    """The media of one modality in a micro-batch that this rank encodes."""

    # [pieces, *piece_shape], float32: this rank's share of the pieces, without those whose features are cached.
    pieces: Tensor
    # Number of pieces that each rank encodes, by context-parallel and tensor-parallel rank; the ranks hold consecutive
    # ranges. A single entry means that the ranks do not share the encoding.
    shares: tuple[tuple[int, ...], ...]
    # [k]: positions of soft tokens among this rank's tokens.
    token_index: Tensor
    # [k]: index of the soft token for each position, among all soft tokens of the micro-batch in the order of the
    # pieces; None: all of them in order. Both whole documents of a pair refer to the same soft tokens.
    soft_index: Optional[Tensor] = None
    # Without a cache None.
    features: Optional[CachedFeatures] = None
    # [own share, feature tokens, width]: features of this rank's share that another pipeline stage has encoded, on the
    # model's device; None: this rank encodes it.
    encoded: Optional[Tensor] = None

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> MediaBatch:
        """Apply `change` to every tensor but `encoded`."""
        features = None if self.features is None else _with_tensors(self.features, change)
        others = _with_tensors(dataclasses.replace(self, encoded=None), change)
        return dataclasses.replace(others, features=features, encoded=self.encoded)


@dataclass
class MicroBatch:
    """A planned micro-batch with its contents; T is the number of tokens on this rank, padding included."""

    # The plan that it was read from.
    plan: PlannedMicroBatch
    # Lengths of documents, or of the spans of pairs that share a prompt, over all context-parallel ranks, padding last.
    document_lengths: tuple[int, ...]
    # [1, T] int64; media positions hold placeholder tokens.
    tokens: Tensor
    # [1, T] int64: the next token.
    labels: Tensor
    # [1, T] float32: 1 for target tokens.
    loss_mask: Tensor
    # [1, T] int64: position of the token's sample in the global batch; -1 for padding.
    sample_positions: Tensor
    # By the modality's name in the configuration: on the first pipeline stage all modalities, on others those that they
    # encode.
    media: dict[str, MediaBatch]
    # Position in the global batch -> why the sample could not be read.
    bad: dict[int, str]
    # [1, T] int64: 1 in the rejected document of a pair, else 0, also in a shared prompt; -1 for padding. None without
    # a plan (generation).
    branch: Optional[Tensor] = None
    # [L] int64: positions where the loss mask is 1, or a single position if there are none. Computed on the host to
    # avoid a GPU synchronization. None without labels.
    label_index: Optional[Tensor] = None
    # Position in `document_lengths` of each answer without its prompt -> the shared prompt that it continues.
    prompts: Mapping[int, PackedPrompt] = field(default_factory=dict)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        """Apply `change` to every tensor, including those of the media."""
        media = {name: batch.with_tensors(change) for name, batch in self.media.items()}
        return dataclasses.replace(_with_tensors(self, change), media=media)

    def pin_memory(self) -> MicroBatch:
        """Copy to pinned memory. Called by torch's DataLoader in its pinning thread."""
        return self.with_tensors(Tensor.pin_memory)

    @classmethod
    def unlabelled(cls, documents: Sequence[Sequence[int]], media: dict[str, MediaBatch]) -> MicroBatch:
        """Concatenated documents for computing logits only: without a plan and without labels."""
        tokens = torch.tensor([[token for document in documents for token in document]], dtype=torch.int64)
        nothing = torch.zeros_like(tokens)
        return cls(
            plan=PlannedMicroBatch(0, tokens.size(1), ()),
            document_lengths=tuple(len(document) for document in documents),
            tokens=tokens,
            labels=nothing,
            loss_mask=nothing.float(),
            sample_positions=nothing - 1,
            media=media,
            bad={},
        )


_Record = TypeVar("_Record", CachedFeatures, MediaBatch, MicroBatch)


def _with_tensors(record: _Record, change: Callable[[Tensor], Tensor]) -> _Record:
    values = {key.name: getattr(record, key.name) for key in dataclasses.fields(record)}
    changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(record, **changed)


def positions_with_label(loss_mask: Tensor) -> Tensor:
    """`MicroBatch.label_index` for a loss mask [1, T]."""
    positions = loss_mask[0].nonzero().flatten()
    return positions if len(positions) else torch.zeros(1, dtype=torch.int64)
