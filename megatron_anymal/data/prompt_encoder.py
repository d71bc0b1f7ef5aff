"""Encoding of prompts as model input: token ids and media pieces.

Generation from training checkpoints and from exported folders shares this code, so that both get the same input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from megatron_anymal.config import ModalityConfig
from megatron_anymal.data.chat_format import open_prompt, parse_messages
from megatron_anymal.data.codes import HASH_ATTRIBUTE, CodeLayout, CodesKind, plan_codes, read_codes
from megatron_anymal.data.content_parts import parse_parts
from megatron_anymal.data.records import CodesPart, DataError, DocumentPart, MediaPart, Part, TextPart, TokensPart
from megatron_anymal.data.tokenizer import Document, Tokenizer
from megatron_anymal.modalities import MediaError, Modality, kind_for_extension

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MediaFile:
    """The content of a prompt's media item."""

    # Content of the file.
    data: bytes
    # Lower case, no leading dot.
    extension: str


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as model input."""

    # Token ids, with one placeholder id per soft token.
    tokens: list[int]
    # For each media item in order: the modality's name in the configuration, and the pieces [n, *piece_shape].
    pieces: list[tuple[str, Tensor]]


def open_parts(value: Mapping[str, Any], where: str) -> list[Part]:
    """Convert a prompt's JSON, with `parts` or `messages`, to the parts that precede the model's answer.

    Raises:
        DataError: naming `where` and what is wrong.
    """
    if ("parts" in value) == ("messages" in value):
        raise DataError(f"{where}: a prompt has either `parts` or `messages`.")
    if "parts" in value:
        return parse_parts(value["parts"], where)
    messages = parse_messages(value["messages"], where)
    if messages[-1].role != "user":
        raise DataError(
            f"{where}: `messages` must end with the user turn to be answered, not with the {messages[-1].role}'s."
        )
    return open_prompt(messages)


def read_media_file(path: Path) -> MediaFile:
    """Read a media file.

    Raises:
        DataError: the file does not exist.
    """
    if not path.is_file():
        raise DataError(f"There is no media file {str(path)!r}.")
    return MediaFile(path.read_bytes(), path.suffix.lstrip(".").lower())


def modality_of(part: MediaPart, file: MediaFile, names: Mapping[str, str]) -> str:
    """Name of the modality that reads a media item.

    Args:
        names: kind -> name of the model's modality of this kind.

    Raises:
        DataError: the model has no modality of this kind.
        MediaError: the file's extension belongs to no kind or to several.
        ConfigError: `names` has a kind that is not registered.
    """
    kind = part.modality or kind_for_extension(file.extension, names)
    if kind not in names:
        known = ", ".join(sorted(names)) or "none"
        raise DataError(f"{part.media!r}: the model has no modality {kind!r}; it has: {known}.")
    return names[kind]


class PromptReader:
    """Reads prompts for the modalities of a model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sections: Mapping[str, ModalityConfig],
        modalities: Mapping[str, Modality],
        codes: Optional[CodeLayout] = None,
    ):
        """Keys of `sections` and `modalities` are the modalities' names in the configuration.

        Args:
            codes: ids of media as codes; None if the model has none.

        Raises:
            DataError: a placeholder is not a reserved token of the tokenizer.
        """
        self._tokenizer, self._modalities, self._codes = tokenizer, modalities, codes
        self._names = {section.kind or name: name for name, section in sections.items()}
        self._soft_tokens = {name: section.projector.num_tokens for name, section in sections.items()}
        self._placeholders = {
            name: tokenizer.placeholder(section.placeholder, f"model.modalities.{name}.placeholder")
            for name, section in sections.items()
        }

    def read(self, parts: Sequence[Part], files: Sequence[MediaFile]) -> TokenizedPrompt:
        """Encode a prompt as an open document, without the end token.

        Args:
            parts: text and media, in order.
            files: the contents of the media parts, in the same order.

        Raises:
            DataError, MediaError: a media item has no modality or cannot be read; a text contains a placeholder.
        """
        named, pieces, soft = self._load_all(parts, files)
        tokens = self._tokenizer.document(named, soft, self._placeholders, closed=False).tokens
        return TokenizedPrompt(tokens, pieces)

    def read_answered(
        self, parts: Sequence[Part], files: Sequence[MediaFile], answers: Sequence[str]
    ) -> tuple[list[Document], list[tuple[str, Tensor]]]:
        """Encode a prompt with each of several answers, whose tokens are the targets, without an end token.

        Returns:
            A document per answer, and the media pieces, which they share, as in `TokenizedPrompt`.

        Raises:
            DataError, MediaError: as in `read`.
        """
        named, pieces, soft = self._load_all(parts, files)
        asked = [part if isinstance(part, MediaPart) else replace(part, loss=False) for part in named]
        documents = [
            self._tokenizer.document([*asked, TextPart(answer)], soft, self._placeholders, closed=False)
            for answer in answers
        ]
        return documents, pieces

    def _load_all(
        self, parts: Sequence[Part], files: Sequence[MediaFile]
    ) -> tuple[list[DocumentPart], list[tuple[str, Tensor]], list[int]]:
        """The parts with their modalities named and codes as tokens, the pieces, and the number of soft tokens of each
        media item with pieces."""
        remaining = iter(files)
        named: list[DocumentPart] = []
        pieces: list[tuple[str, Tensor]] = []
        for part in parts:
            if isinstance(part, CodesPart):
                named.append(TokensPart(self._tokens(part, next(remaining).data), part.loss))
                continue
            if isinstance(part, MediaPart):
                name, tensor = self._load(part, next(remaining))
                pieces.append((name, tensor))
                part = MediaPart(part.media, name, part.attributes)
            named.append(part)
        return named, pieces, [len(tensor) * self._soft_tokens[name] for name, tensor in pieces]

    def _tokens(self, part: CodesPart, data: bytes) -> tuple[int, ...]:
        """Begin mark, codes and end mark of an item."""
        if self._codes is None or not self._codes.sections:
            raise DataError(f"{part.media!r} is codes, but the model's vocabulary has none (model.discrete is empty).")
        try:
            stated = part.attributes.get(HASH_ATTRIBUTE, "")
            kind = CodesKind.of(part, part.modality, len(read_codes(data)), stated, rejected=False)
            name = plan_codes(kind, self._codes.sections, f"{part.media!r}").name
            return self._codes.tokens(name, data, generated=part.generated)
        except MediaError as error:
            raise MediaError(f"{part.media!r} {error}.") from error

    def _load(self, part: MediaPart, file: MediaFile) -> tuple[str, Tensor]:
        try:
            name = modality_of(part, file, self._names)
            return name, self._modalities[name].load(file.data, file.extension, part.attributes)
        except MediaError as error:
            raise MediaError(f"{part.media!r}: {error}.") from error
