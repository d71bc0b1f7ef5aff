"""Data types shared by the stages of the data pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional, TypeVar, Union

if TYPE_CHECKING:
    from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used. The message names the folder, file or sample, and the fix."""


@dataclass(frozen=True)
class TextPart:
    """A text part of a sample."""

    # The text.
    text: str
    # Whether its tokens are loss targets.
    loss: bool = True
    # Whether control tokens in the text are parsed as such; true only for the chat format's own text.
    control: bool = False


@dataclass(frozen=True)
class MediaPart:
    """A media part of a sample."""

    # Name of the shard member, or path of the file in a manifest.
    media: str
    # The registered kind: image, video, audio, imu, ...
    modality: str
    # Further properties from the sample's JSON, for example {"rate": 50}.
    attributes: Mapping[str, Any] = field(default_factory=dict)


Part = Union[TextPart, MediaPart]

# Kinds of samples. An index stores the position in this tuple.
SAMPLE_KINDS = ("parts", "messages", "preference")


@dataclass(frozen=True)
class Sample:
    """A sample's documents as lists of parts: a single one, or the chosen and the rejected one of a preference pair.

    Both documents of a pair contain the same media.
    """

    # One of SAMPLE_KINDS.
    kind: str
    # Parts of the only document, or of the chosen and the rejected one.
    documents: tuple[list[Part], ...]

    @property
    def closed(self) -> bool:
        """Whether the tokenizer's end token is appended; the last turn of a conversation has its own end token."""
        return self.kind == "parts"


@dataclass(frozen=True)
class PlannedMedia:
    """A media item of a planned sample: the modality's name in the configuration and the number of pieces."""

    # Name of the modality in the configuration.
    modality: str
    # Number of pieces.
    pieces: int


@dataclass(frozen=True)
class PlannedSample:
    """A sample of a global batch, as planned from the index alone."""

    # Position in the global batch.
    position: int
    # Number of its dataset.
    dataset: int
    # Its position in the dataset.
    sample: int
    # LLM tokens (text and soft tokens) of each document: a single one, or the chosen and the rejected one of a pair.
    documents: tuple[int, ...]
    # Target tokens of all documents.
    targets: int
    # Each document contains all media; they are encoded once.
    media: tuple[PlannedMedia, ...]

    @property
    def length(self) -> int:
        """LLM tokens of all documents."""
        return sum(self.documents)


@dataclass(frozen=True)
class PlannedMicroBatch:
    """Input of one forward pass of one replica: consecutive documents, then padding."""

    # Step number, counted from 0.
    step: int
    # Tokens including padding.
    padded_length: int
    # The samples whose documents make up the pack, in order.
    samples: tuple[PlannedSample, ...]
    # Document lengths in the pack are padded to a multiple of this (data/context_parallel.py).
    document_multiple: int = 1


@dataclass
class MediaBatch:
    """The media of one modality in a micro-batch that this rank encodes."""

    # [pieces, *piece_shape], float32: this rank's share of the pieces.
    pieces: Tensor
    # Number of pieces that each rank encodes, by context-parallel and tensor-parallel rank; the ranks hold consecutive
    # ranges. A single entry means that the ranks do not share the encoding.
    shares: tuple[tuple[int, ...], ...]
    # [k]: positions of soft tokens among this rank's tokens.
    token_index: Tensor
    # [k]: index of the soft token for each position, among all soft tokens of the micro-batch in the order of the
    # pieces; None: all of them in order. Both documents of a preference pair refer to the same soft tokens.
    soft_index: Optional[Tensor] = None


@dataclass
class MicroBatch:
    """A planned micro-batch with its contents; T is the number of tokens on this rank, padding included."""

    # The plan that it was read from.
    plan: PlannedMicroBatch
    # Document lengths over all context-parallel ranks, padding last.
    document_lengths: tuple[int, ...]
    # [1, T] int64; media positions hold placeholder tokens.
    tokens: Tensor
    # [1, T] int64: the next token.
    labels: Tensor
    # [1, T] float32: 1 for target tokens.
    loss_mask: Tensor
    # [1, T] int64: position of the token's sample in the global batch; -1 for padding.
    sample_positions: Tensor
    # By the modality's name in the configuration; empty except on the first pipeline stage.
    media: dict[str, MediaBatch]
    # Position in the global batch -> why the sample could not be read.
    bad: dict[int, str]
    # [1, T] int64: 1 in the rejected document of a pair, else 0; -1 for padding. None without a plan (generation).
    branch: Optional[Tensor] = None
    # [L] int64: positions where the loss mask is 1, or a single position if there are none. Computed on the host to
    # avoid a GPU synchronization. None without labels.
    label_index: Optional[Tensor] = None

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        """Apply `change` to every tensor, including those of the media."""
        media = {name: _with_tensors(batch, change) for name, batch in self.media.items()}
        return dataclasses.replace(_with_tensors(self, change), media=media)

    def pin_memory(self) -> MicroBatch:
        """Copy to pinned memory. Called by torch's DataLoader in its pinning thread."""
        return self.with_tensors(lambda tensor: tensor.pin_memory())

    @classmethod
    def unlabelled(cls, documents: Sequence[Sequence[int]], media: dict[str, MediaBatch]) -> MicroBatch:
        """Concatenated documents for computing logits only: without a plan and without labels."""
        import torch

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


_Record = TypeVar("_Record", MediaBatch, MicroBatch)


def _with_tensors(record: _Record, change: Callable[[Tensor], Tensor]) -> _Record:
    from torch import Tensor

    values = {key.name: getattr(record, key.name) for key in dataclasses.fields(record)}
    changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(record, **changed)


def places_with_label(loss_mask: Tensor) -> Tensor:
    """`MicroBatch.label_index` for a loss mask [1, T]."""
    positions = loss_mask[0].nonzero().flatten()
    return positions if len(positions) else positions.new_zeros(1)
