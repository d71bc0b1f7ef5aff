"""Requests of an evaluation harness as prompts and settings of this package: chat messages with media in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_anymal.config import ConfigError
from megatron_anymal.data.prompt_encoder import open_parts
from megatron_anymal.data.records import DataError, MediaPart
from megatron_anymal.generation.generator import Generator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.hf.media_inputs import GivenMedia
from megatron_anymal.modalities import MediaError
from megatron_anymal.telemetry import Progress

# Tokens of an answer if the task does not limit them.
DEFAULT_MAX_NEW_TOKENS = 1024
# lmms-eval adds this stop text to tasks that name none. Answers with paragraphs would be cut off, so its models leave
# it out.
_DEFAULT_STOP = "\n\n"
# Settings that choose tokens; `num_beams` is refused unless it is 1.
_USED = ("until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams")
# Settings of LLaVA's image processing, which tasks of lmms-eval pass to all models.
_IGNORED = ("image_aspect_ratio",)


@dataclass(frozen=True)
class HarnessRequest:
    """A conversation to answer."""

    # Names it in error messages: its task and document.
    name: str
    # Returns the messages, with their media; called when the request is answered.
    messages: Callable[[], Sequence[Mapping[str, Any]]]
    # The task's generation settings, as for transformers' `generate`, and `until`: texts that end the answer.
    settings: Mapping[str, Any]


def answer_requests(generator: Generator, requests: Sequence[HarnessRequest], batch_size: int) -> list[str]:
    """Answer requests, those of the same settings in batches.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: a request cannot be answered; the message names its batch and the item.
    """
    by_settings: dict[Sampling, list[int]] = {}
    for number, request in enumerate(requests):
        by_settings.setdefault(sampling_of(request.settings, request.name), []).append(number)
    answers = [""] * len(requests)
    progress = Progress("answering", len(requests))
    for sampling, numbers in by_settings.items():
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            for number, answer in zip(batch, _answer(generator, requests, batch, sampling)):
                answers[number] = answer
            progress.advance(len(batch))
    progress.finish()
    return answers


def prompt_of(messages: Sequence[Mapping[str, Any]], where: str) -> Prompt:
    """Lay a conversation out as in training, up to the answer.

    Args:
        messages: with `role` and `content`, a text or parts: {"type": "text", "text": TEXT} and {"type": KIND, "url":
            ITEM}, where an item is a path, an address, a file's bytes, a PIL image, or an array; a sound may also be
            {"array": [samples], "sampling_rate": Hz}, and a file {"bytes": ..., "path": ...}.

    Raises:
        DataError: naming `where` and what cannot be used.
    """
    given = GivenMedia(where)
    parts = open_parts({"messages": [given.message(_with_plain_media(one, where)) for one in messages]}, where)
    return Prompt(parts, [given.files[part.media] for part in parts if isinstance(part, MediaPart)])


def sampling_of(settings: Mapping[str, Any], where: str) -> Sampling:
    """Convert a task's generation settings.

    Raises:
        ConfigError: naming `where` and the setting that is not known or has no counterpart.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if unknown := sorted(set(given) - {*_USED, *_IGNORED}):
        raise ConfigError(
            f"{where}: the generation setting {unknown[0]!r} is not supported; known: {', '.join(_USED)}. Remove it "
            "from the task's generation_kwargs."
        )
    if given.get("num_beams", 1) != 1:
        raise ConfigError(f"{where}: num_beams={given['num_beams']}, but answers are not searched with beams. Use 1.")
    until = given.get("until", [])
    stops = [until] if isinstance(until, str) else until
    try:
        # As lmms-eval's own models: tasks without a temperature are greedy, and greedy ones may have top_p=0.
        temperature = 0.0 if given.get("do_sample") is False else float(given.get("temperature", 0.0))
        return Sampling(
            max_new_tokens=int(given.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)),
            temperature=temperature,
            top_p=float(given.get("top_p", 1.0)) if temperature else 1.0,
            top_k=int(given.get("top_k", 0)),
            repetition_penalty=float(given.get("repetition_penalty", 1.0)),
            stop=tuple(stop for stop in stops if stop not in ("", _DEFAULT_STOP)),
        )
    except (ConfigError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}: its generation settings cannot be used: {error}") from None


def _answer(
    generator: Generator, requests: Sequence[HarnessRequest], batch: Sequence[int], sampling: Sampling
) -> list[str]:
    try:
        prompts = [prompt_of(requests[number].messages(), requests[number].name) for number in batch]
        return [reply.text for reply in generator.answer_batch(prompts, batch, sampling)]
    except (DataError, MediaError) as error:
        raise DataError(f"{requests[batch[0]].name} to {requests[batch[-1]].name}: {error}") from error


def _with_plain_media(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A message whose media items are what `GivenMedia` takes."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    return {**message, "content": [_plain(part, where) for part in content]}


def _plain(part: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    item = part.get("url")
    if clipped := [name for name in ("start_time", "end_time") if part.get(name) is not None]:
        raise DataError(f"{where}: {clipped[0]} of a video is not supported. Cut the file, or choose another task.")
    plain = {name: value for name, value in part.items() if name not in ("start_time", "end_time")}
    if not isinstance(item, Mapping):
        return plain
    for name in ("array", "bytes", "path", "url"):
        if item.get(name) is not None:
            rate = {"sampling_rate": item["sampling_rate"]} if name == "array" and "sampling_rate" in item else {}
            return {**plain, "url": item[name], **rate}
    raise DataError(f"{where}: a media item has the keys {sorted(item)}; it needs one of array, bytes, path, url.")
