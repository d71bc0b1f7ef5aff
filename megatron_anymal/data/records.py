"""What passes between the parts of the data path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, TypeVar, Union

import torch
from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used. The message names the folder, file or sample and the mend."""


@dataclass(frozen=True)
class TextPart:
    """A stretch of text of a sample."""

    text: str
    # Whether its tokens are targets of the loss.
    loss: bool = True
    # Whether control tokens written in it are those tokens: the chat format's own text. All other text is literal.
    control: bool = False


@dataclass(frozen=True)
class MediaPart:
    """A media item of a sample, in its place between the texts."""

    # The member's name in the shard, or the file's path in a manifest.
    media: str
    # The registered kind: image, video, audio, imu, ...
    modality: str
    # Whatever else the sample says of the item, for example {"rate": 50}.
    attributes: Mapping[str, Any] = field(default_factory=dict)


Part = Union[TextPart, MediaPart]

# What a sample can be, by the numbers that an index holds.
SAMPLE_KINDS = ("parts", "messages", "preference")


@dataclass(frozen=True)
class Sample:
    """A sample's documents as their parts: one, or of a preference pair the chosen and then the rejected one.

    The documents of a pair hold the same media.
    """

    # One of SAMPLE_KINDS.
    kind: str
    documents: tuple[list[Part], ...]

    @property
    def closed(self) -> bool:
        """Whether the tokenizer's end token follows: a conversation's last turn has an end of its own."""
        return self.kind == "parts"


@dataclass(frozen=True)
class PlannedMedia:
    """A media item of a planned sample: its modality's name in the configuration and its number of pieces."""

    modality: str
    pieces: int


@dataclass(frozen=True)
class PlannedSample:
    """One sample of a global batch, known from the index alone."""

    # Its place in the global batch.
    position: int
    dataset: int
    sample: int
    # LLM tokens, text and soft tokens, of each of its documents: one, or the chosen and the rejected one of a pair.
    documents: tuple[int, ...]
    # Tokens that enter the loss, of all its documents.
    targets: int
    # Every document holds all of them; they are encoded once.
    media: tuple[PlannedMedia, ...]

    @property
    def length(self) -> int:
        """LLM tokens of all its documents."""
        return sum(self.documents)


@dataclass(frozen=True)
class PlannedMicroBatch:
    """What one forward pass of one replica takes: documents, one after the other, then padding."""

    step: int
    # Tokens with the padding.
    padded_length: int
    samples: tuple[PlannedSample, ...]
    # What each document's length in the pack is a multiple of (data/context_parallel.py).
    document_multiple: int = 1


@dataclass
class MediaBatch:
    """One modality's media of a micro-batch, as far as this rank encodes them."""

    # [pieces, *piece_shape], float32: this rank's share of the pieces.
    pieces: Tensor
    # [context-parallel rank][tensor-parallel rank]: how many pieces each holds, one rank's after the other's. A single
    # number: the ranks do not share the encoding.
    shares: tuple[tuple[int, ...], ...]
    # [k]: where among this rank's tokens soft tokens go.
    token_index: Tensor
    # [k]: which of the micro-batch's soft tokens, in the order of the pieces; None: all of them. A preference pair's
    # documents name the same ones.
    soft_index: Optional[Tensor] = None


@dataclass
class MicroBatch:
    """A planned micro-batch with its contents; T is the padded number of tokens that this rank holds of it."""

    plan: PlannedMicroBatch
    # Lengths of the documents, the padding last, over all context-parallel ranks.
    document_lengths: tuple[int, ...]
    # [1, T] int64; placeholders where media go.
    tokens: Tensor
    # [1, T] int64: the next token.
    labels: Tensor
    # [1, T] float32: 1 where the label counts.
    loss_mask: Tensor
    # [1, T] int64: the sample's place in the global batch; -1 for padding.
    sample_positions: Tensor
    # By the modality's name in the configuration; empty away from the first stage.
    media: dict[str, MediaBatch]
    # Place in the global batch -> why the sample could not be read.
    bad: dict[int, str]
    # [1, T] int64: 0, in the rejected document of a pair 1; -1 for padding. None where no plan was read (generation).
    branch: Optional[Tensor] = None
    # [L] int64: where the loss mask is 1; where it is nowhere, one place. Found on the host: no GPU waits for it. None
    # where nothing has a label.
    label_index: Optional[Tensor] = None

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The same with each of its tensors changed, those of its media too."""
        media = {name: _with_tensors(batch, change) for name, batch in self.media.items()}
        return dataclasses.replace(_with_tensors(self, change), media=media)

    def pin_memory(self) -> MicroBatch:
        """The same in memory that a card can read by itself. torch's DataLoader calls it, in a thread of its own."""
        return self.with_tensors(Tensor.pin_memory)

    @classmethod
    def unlabelled(cls, documents: Sequence[Sequence[int]], media: dict[str, MediaBatch]) -> MicroBatch:
        """Token ids of documents, end to end, for logits alone: without a plan and without labels."""
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
    values = {key.name: getattr(record, key.name) for key in dataclasses.fields(record)}
    changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(record, **changed)


def places_with_label(loss_mask: Tensor) -> Tensor:
    """`MicroBatch.label_index` of a loss mask [1, T]."""
    found = loss_mask[0].nonzero().flatten()
    return found if len(found) else torch.zeros(1, dtype=torch.int64)
