"""Prompts: documents up to the point where the model answers, with their media read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.codes import HASH_ATTRIBUTE
from megatron_anymal.data.content_parts import CODES_ENDING, parse_part
from megatron_anymal.data.prompt_encoder import MediaFile, open_parts, read_media_file
from megatron_anymal.data.records import CodesPart, DataError, MediaPart, Part
from megatron_anymal.data.samples import read_lines
from megatron_anymal.modalities import MediaError

if TYPE_CHECKING:
    from megatron_anymal.data.media_tokenizers import MediaTokenizer


@dataclass(frozen=True)
class Prompt:
    """A document up to the point where the model answers: content parts, and the files of the media parts, in order.

    For a conversation these are the parts of data/chat_format.py, ending with the header of the assistant's turn.
    """

    # Texts and media items, in order.
    parts: Sequence[Part]
    # Content of the media items, in order.
    media: Sequence[MediaFile]


def read_prompts(path: str) -> list[Prompt]:
    """Read prompts from a .jsonl file; media paths are relative to it.

    Raises:
        DataError: the file or one of its lines cannot be used.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"There is no prompts file {path!r}.")
    prompts = []
    for where, value in read_lines(file):
        parts = open_parts(value, where)
        media = [read_media_file(file.parent / part.media) for part in parts if isinstance(part, MediaPart)]
        prompts.append(Prompt(parts, media))
    if not prompts:
        raise DataError(f"The prompts file {path!r} is empty. Write one object with `parts` or `messages` per line.")
    return prompts


def prompt_of_files(
    paths: Sequence[str], kinds: Sequence[str], rate: float | None, text: str, *, chat: bool = False
) -> Prompt:
    """Build a prompt of media files in order, followed by a text.

    Args:
        kinds: modalities of the first files; a missing or empty one is detected from the file's extension.
        rate: samples per second of the files that do not specify it.
        chat: send the prompt as a user turn.

    Raises:
        DataError: there is nothing to answer, a file does not exist, or there are more kinds than files.
    """
    if not text and not paths:
        raise DataError("There is nothing to answer. Give --text, --media or --prompts.")
    if len(kinds) > len(paths):
        raise DataError("There are more --modality than --media. Give each --media at most one, in the same order.")
    if rate is not None and not paths:
        raise DataError("--rate needs --media, which is missing. Remove it.")
    attributes = {} if rate is None else {"rate": rate}
    all_kinds = [*kinds, *[""] * (len(paths) - len(kinds))]
    content: list[dict[str, Any]] = [
        {"media": path, "modality": kind, **attributes} for path, kind in zip(paths, all_kinds)
    ]
    content += [{"text": text}] if text else []
    media = [read_media_file(Path(path)) for path in paths]
    if chat:
        return Prompt(open_parts({"messages": [{"role": "user", "content": content}]}, "--chat"), media)
    return Prompt([parse_part(part, "the prompt") for part in content], media)


def encoded(prompt: Prompt, tokenizers: Mapping[str, MediaTokenizer]) -> Prompt:
    """The prompt with media whose modality has a tokenizer as codes.

    Args:
        tokenizers: name in model.discrete -> its tokenizer.

    Raises:
        MediaError: an item cannot be decoded.
        DataError: a tokenizer returns something else than codes.
    """
    files = iter(prompt.media)
    parts: list[Part] = []
    media: list[MediaFile] = []
    for part in prompt.parts:
        if isinstance(part, MediaPart):
            part, file = _encoded(part, next(files), tokenizers)
            media.append(file)
        parts.append(part)
    return Prompt(parts, media)


def _encoded(part: MediaPart, file: MediaFile, tokenizers: Mapping[str, MediaTokenizer]) -> tuple[MediaPart, MediaFile]:
    tokenizer = tokenizers.get(part.modality)
    if tokenizer is None or isinstance(part, CodesPart):
        return part, file
    # It imports the libraries that decode media.
    from megatron_anymal.data.media_encoding import code_files

    try:
        [codes] = code_files(part.modality, tokenizer, [(file.extension, file.data)], LimitsConfig())
    except MediaError as error:
        raise MediaError(f"{part.media!r} {error}.") from error
    attributes = {**part.attributes, HASH_ATTRIBUTE: tokenizer.hash}
    return CodesPart(f"{part.media}.{CODES_ENDING}", part.modality, attributes), MediaFile(codes, "npy")
