"""Check that the exported tokenizer's chat template produces the token ids of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from megatron_anymal.config import DataConfig, ModalityConfig
from megatron_anymal.data.chat_format import CHAT_TOKENS, last_answer, lay_out, messages_of, open_prompt, parse_messages
from megatron_anymal.data.records import CodesPart, DataError, MediaPart, Part, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.tokenizer import Tokenizer

# Conversations compared per prepared folder.
_PER_FOLDER = 64
_SAYINGS = (
    "What is this?",
    "  \n\n a  b \t\n c \n",
    "'s 1234\n\nthree...",
    "\u00bf\u00c7a va? \u65e5\u672c",
    "1. x\n2. y",
)


class ChatIdsError(ValueError):
    """The exported template and training disagree; the message names the conversation and the first difference."""


def compare_chat_ids(
    folder: Path, tokenizer: Tokenizer, modalities: Mapping[str, ModalityConfig], data: DataConfig
) -> int:
    """Compare built-in conversations and ones from the run's prepared folders, whole and up to their last answer.

    Args:
        folder: folder with the exported tokenizer.
        tokenizer: the run's tokenizer.
        modalities: those of the export; conversations with media of another one are skipped.
        data: the run's section, for its prepared folders.

    Returns:
        Number of conversations compared; 0 if the tokenizer lacks the chat format's tokens.

    Raises:
        ChatIdsError: token ids differ.
    """
    if not tokenizer.control.keys() >= set(CHAT_TOKENS):
        return 0
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    placeholders = {section.kind or name: section.placeholder for name, section in modalities.items()}
    numbers = {kind: tokenizer.control.get(token, -1) for kind, token in placeholders.items()}
    count = 0
    for where, messages in _conversations(data, list(placeholders)):
        contents = [part for message in messages for part in message["content"]]
        if any(part.get("modality", "") not in placeholders for part in contents if "media" in part):
            continue
        if any(token in part.get("text", "") for part in contents for token in tokenizer.control):
            # A string cannot express control tokens as plain text; the template refuses them.
            continue
        parsed = parse_messages(messages, where)
        theirs = [{**message, "content": [_theirs(part) for part in message["content"]]} for message in messages]
        for parts, chat, ask in ((open_prompt(parsed[:-1]), theirs[:-1], True), (lay_out(parsed), theirs, False)):
            media = sum(isinstance(part, MediaPart) for part in parts)
            expected = tokenizer.document(parts, [1] * media, numbers, closed=False).tokens
            try:
                rendered = exported.apply_chat_template(chat, add_generation_prompt=ask, return_dict=False)
            except TemplateError as error:
                raise ChatIdsError(f"{where}: the exported chat template rejects it: {error}") from error
            if list(rendered) != expected:
                raise ChatIdsError(_difference(where, tokenizer, expected, list(rendered)))
        count += 1
    return count


def _conversations(data: DataConfig, kinds: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield a label and `messages` as in data/chat_format.py, ending with an assistant message."""
    media = [{"media": "x", "modality": kind} for kind in kinds]
    for number, text in enumerate(_SAYINGS):
        other, third = [{"text": _SAYINGS[number - 1]}], [{"text": _SAYINGS[number - 2]}]
        yield (
            f"built-in conversation {number}",
            [
                *[{"role": "system", "content": third}] * (number % 2),
                {"role": "user", "content": [*media, {"text": text}, *media, *other, *media[:1]]},
                {"role": "assistant", "content": other},
                {"role": "user", "content": [{"text": text}]},
                {"role": "assistant", "content": third},
            ],
        )
    sets = [*data.validation.values(), *data.train.values()]
    for folder in dict.fromkeys(dataset.path for dataset in sets):
        try:
            index = ShardIndex(folder)
        except DataError:
            # The folder was moved; verify reports it if its samples are needed.
            continue
        for number in range(min(len(index), _PER_FOLDER)):
            sample = index.sample(number)
            if not sample.closed and not any(isinstance(part, CodesPart) for part in sample.media):
                opened, answer = last_answer(sample.documents[0])
                history = [
                    {"role": one.role, "content": [_ours(part) for part in one.content]}
                    for one in messages_of(opened) or ()
                ]
                final = {"role": "assistant", "content": [_ours(part) for part in answer]}
                yield f"{folder}, sample {index.key(number)!r}", [*history, final]


def _ours(part: Part) -> dict[str, Any]:
    return {"text": part.text} if isinstance(part, TextPart) else {"media": "x", "modality": part.modality}


def _theirs(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": part["text"]} if "text" in part else {"type": part["modality"]}


def _difference(where: str, tokenizer: Tokenizer, expected: list[int], actual: list[int]) -> str:
    position = next((n for n, (a, b) in enumerate(zip(expected, actual)) if a != b), min(len(expected), len(actual)))
    names = [tokenizer.hf.convert_ids_to_tokens(ids[position : position + 3]) for ids in (expected, actual)]
    return (
        f"{where}: training produces {names[0]} at position {position}, the exported chat template {names[1]}. The "
        "export would see prompts in a format it was not trained on."
    )
