"""Data types shared by the stages of the data pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Union


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


@dataclass(frozen=True)
class CodesPart(MediaPart):
    """A media item as codes of the Llama's own vocabulary (data/codes.py); `modality` is a name in model.discrete."""

    # Whether it belongs to an answer: then all codebooks count, and in a prompt only the first ones.
    generated: bool = False
    # Whether its marks and codes are loss targets.
    loss: bool = False


@dataclass(frozen=True)
class TokensPart:
    """A part of a sample that is token ids already: marks and codes of a `CodesPart` whose file has been read."""

    # The ids.
    tokens: tuple[int, ...]
    # Whether they are loss targets.
    loss: bool = False


Part = Union[TextPart, MediaPart]
# A part of a document that is ready for the tokenizer.
DocumentPart = Union[TextPart, MediaPart, TokensPart]

# Kinds of samples. An index stores the position in this tuple.
SAMPLE_KINDS = ("parts", "messages", "preference")


@dataclass(frozen=True)
class Sample:
    """A sample's documents as lists of parts: a single one, or the chosen and the rejected one of a preference pair.

    Both documents of a pair contain the same media, except for codes in their answers.
    """

    # One of SAMPLE_KINDS.
    kind: str
    # Parts of the only document, or of the chosen and the rejected one.
    documents: tuple[list[Part], ...]

    @property
    def closed(self) -> bool:
        """Whether the tokenizer's end token is appended; the last turn of a conversation has its own end token."""
        return self.kind == "parts"

    @property
    def media(self) -> list[MediaPart]:
        """Its media items in the order of the index: those of the first document, then codes of the rejected answer."""
        first, *rest = self.documents
        media = [part for part in first if isinstance(part, MediaPart)]
        return media + [part for parts in rest for part in parts if isinstance(part, CodesPart) and part.loss]

    def item_numbers(self) -> list[list[int]]:
        """For each document, the positions in `media` of its media items, in order."""
        numbers: list[list[int]] = []
        count = 0
        for parts in self.documents:
            own, shared = [], 0
            for part in parts:
                if isinstance(part, MediaPart):
                    # Media of the prompt come first in every document.
                    new = not numbers or (isinstance(part, CodesPart) and part.loss)
                    own.append(count if new else shared)
                    count, shared = count + new, shared + 1
            numbers.append(own)
        return numbers


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
    # Tokens at the start of both documents of a pair that the pack holds once; 0 if it holds whole documents.
    shared: int = 0

    @property
    def spans(self) -> tuple[int, ...]:
        """Tokens of each of its spans in a pack: the documents, or the shared prompt and the rest of each document."""
        if not self.shared:
            return self.documents
        return (self.shared, *(length - self.shared for length in self.documents))

    @property
    def length(self) -> int:
        """LLM tokens that it takes in a pack."""
        return sum(self.spans)


class PackedPrompt(NamedTuple):
    """A shared prompt in a pack."""

    # Position of its first token in the pack.
    first: int
    # Its tokens, without padding.
    length: int


@dataclass(frozen=True)
class PlannedMicroBatch:
    """Input of one forward pass of one replica: consecutive spans of samples, then padding."""

    # Step number, counted from 0.
    step: int
    # Tokens including padding.
    padded_length: int
    # The samples whose documents make up the pack, in order.
    samples: tuple[PlannedSample, ...]
    # Lengths of spans in the pack are padded to a multiple of this (data/context_parallel.py).
    document_multiple: int = 1
    # Modalities that a later pipeline stage encodes for the first one, and the stage (data/stage_shares.py).
    encoded_on: tuple[tuple[str, int], ...] = ()

    def encoder_stage(self, modality: str) -> int:
        """Return the pipeline stage that encodes a modality's media."""
        return dict(self.encoded_on).get(modality, 0)
