"""From a prompt to what a model takes: token ids and media pieces.

Training checkpoints and exported folders are asked through this file, so that both see the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_anymal.config import ModalityConfig
from megatron_anymal.data.chat_format import open_prompt, parse_messages
from megatron_anymal.data.content_parts import parse_parts
from megatron_anymal.data.records import DataError, MediaPart, Part
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.modalities import MediaError, Modality, kind_for_extension


@dataclass(frozen=True)
class MediaFile:
    """A media item of a prompt, read."""

    data: bytes
    # Lower case, no leading dot.
    extension: str


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as a model takes it."""

    # With a placeholder id where each soft token goes.
    tokens: list[int]
    # Each media item's modality, by its name in the configuration, and pieces [n, *piece_shape], in order.
    pieces: list[tuple[str, Tensor]]


def open_parts(value: Mapping[str, Any], where: str) -> list[Part]:
    """A prompt's JSON, with `parts` or `messages`, as parts up to where the model answers.

    Raises:
        DataError: naming `where` and what cannot be used.
    """
    if ("parts" in value) == ("messages" in value):
        raise DataError(f"{where}: a prompt has either `parts` or `messages`.")
    if "parts" in value:
        return parse_parts(value["parts"], where)
    messages = parse_messages(value["messages"], where)
    if messages[-1].role != "user":
        raise DataError(
            f"{where}: `messages` must end with the user turn to be answered; they end with the {messages[-1].role}'s."
        )
    return open_prompt(messages)


def read_media_file(path: Path) -> MediaFile:
    """A media file's bytes.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"There is no media file {str(path)!r}.")
    return MediaFile(path.read_bytes(), path.suffix.lstrip(".").lower())


class PromptReader:
    """Reads prompts for the modalities of a model."""

    def __init__(
        self, tokenizer: Tokenizer, sections: Mapping[str, ModalityConfig], modalities: Mapping[str, Modality]
    ):
        """`sections` and `modalities` go by the modalities' names in the configuration.

        Raises:
            DataError: a placeholder that is no reserved token of the tokenizer.
        """
        self._tokenizer, self._modalities = tokenizer, modalities
        self._names = {section.kind or name: name for name, section in sections.items()}
        self._soft_tokens = {name: section.projector.num_tokens for name, section in sections.items()}
        self._placeholders = {
            name: tokenizer.placeholder(section.placeholder, f"model.modalities.{name}.placeholder")
            for name, section in sections.items()
        }

    def read(self, parts: Sequence[Part], files: Sequence[MediaFile]) -> TokenizedPrompt:
        """Tokens and pieces of a document that is left open.

        Args:
            parts: text and media, in order.
            files: what the media parts hold, in theirs.

        Raises:
            DataError, MediaError: a media item has no modality or cannot be read; a text holds a placeholder.
        """
        remaining = iter(files)
        named: list[Part] = []
        pieces: list[tuple[str, Tensor]] = []
        for part in parts:
            if isinstance(part, MediaPart):
                name, tensor = self._load(part, next(remaining))
                pieces.append((name, tensor))
                part = MediaPart(part.media, name, part.attributes)
            named.append(part)
        soft = [len(tensor) * self._soft_tokens[name] for name, tensor in pieces]
        tokens = self._tokenizer.document(named, soft, self._placeholders, closed=False).tokens
        return TokenizedPrompt(tokens, pieces)

    def _load(self, part: MediaPart, file: MediaFile) -> tuple[str, Tensor]:
        try:
            kind = part.modality or kind_for_extension(file.extension, self._names)
            if kind not in self._names:
                known = ", ".join(sorted(self._names)) or "none"
                raise DataError(f"{part.media!r}: the model has no modality {kind!r}; it has: {known}.")
            name = self._names[kind]
            return name, self._modalities[name].load(file.data, file.extension, part.attributes)
        except MediaError as error:
            raise MediaError(f"{part.media!r}: {error}.") from error
