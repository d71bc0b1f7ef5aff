"""Requests for chat completions: every field is used, known to have no effect, or refused by name."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from megatron_anymal.config import ConfigError
from megatron_anymal.data.prompt_encoder import MediaFile, open_parts
from megatron_anymal.data.records import DataError
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.serving.errors import RequestError, invalid
from megatron_anymal.serving.media import read_media_part

# Fields that are used.
_USED = (
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "stop",
    "seed",
)
# Fields that do not affect an answer.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Fields whose effect is not supported, with the values that ask for none.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Roles of OpenAI's API -> of conversations in data sets.
_ROLES = {"developer": "system"}
_MAX_STOPS = 16


@dataclass(frozen=True)
class ChatRequest:
    """A request for one answer."""

    # The conversation, with its media.
    prompt: Prompt
    # How the answer is chosen.
    sampling: Sampling
    # Whether the answer is sent while it is computed.
    stream: bool
    # Whether a stream ends with the counts of tokens.
    include_usage: bool


def read_request(value: Any, model: str, kinds: Collection[str], max_new_tokens: int) -> ChatRequest:
    """Convert the JSON of a request.

    Args:
        model: name of the served model.
        kinds: kinds of its media.
        max_new_tokens: maximum number of tokens in an answer.

    Raises:
        RequestError: with status 404 for another model, else 400, naming the field.
    """
    if not isinstance(value, dict):
        raise RequestError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object.")
    given = {name: field for name, field in value.items() if field is not None}
    _check_fields(given)
    if not isinstance(given.get("model"), str):
        raise invalid("model", f"must name a model; this server has {model!r}.")
    if given["model"] != model:
        raise RequestError(
            HTTPStatus.NOT_FOUND,
            f"model: there is no model {given['model']!r}; this server has {model!r}.",
            "model",
            "model_not_found",
        )
    stream, options = given.get("stream", False), given.get("stream_options", {})
    if not isinstance(stream, bool):
        raise invalid("stream", "must be true or false.")
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise invalid("stream_options", "must be an object with `include_usage`, true or false.")
    if unknown := sorted(set(options) - {"include_usage"}):
        raise invalid(f"stream_options.{unknown[0]}", "unknown field; known: include_usage.")
    if options and not stream:
        raise invalid("stream_options", "only a stream has them. Set stream, or remove them.")
    prompt = _prompt(given.get("messages"), kinds)
    return ChatRequest(prompt, _sampling(given, max_new_tokens), stream, bool(options.get("include_usage")))


def _check_fields(given: Mapping[str, Any]) -> None:
    for name, field in given.items():
        if name in _USED or name in _IGNORED:
            continue
        if name not in _WITHOUT_EFFECT:
            near = difflib.get_close_matches(name, [*_USED, *_WITHOUT_EFFECT], n=1)
            raise invalid(name, "unknown field." + (f" Did you mean {near[0]}?" if near else ""), "unknown_parameter")
        # 1 == True in Python, not in JSON.
        if not any(field == one and isinstance(field, bool) == isinstance(one, bool) for one in _WITHOUT_EFFECT[name]):
            only = " or ".join(map(repr, _WITHOUT_EFFECT[name]))
            raise invalid(name, f"not supported by this server, apart from {only}.", "unsupported_parameter")


def _sampling(given: Mapping[str, Any], limit: int) -> Sampling:
    """The settings of the answer; the defaults are those of `anymal generate`."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(names) == 2:
        raise invalid("max_tokens", "max_completion_tokens is its newer name. Remove one of them.")
    name = names[0] if names else "max_tokens"
    tokens = _integer(given, name, limit)
    if tokens > limit:
        raise invalid(name, f"{tokens} is above this server's --max-new-tokens={limit}.")
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(one, str) for one in stops):
        raise invalid("stop", f"must be a text or a list of at most {_MAX_STOPS} texts.")
    defaults = Sampling()
    settings: dict[str, Any] = {
        "temperature": _number(given, "temperature", defaults.temperature),
        "top_p": _number(given, "top_p", defaults.top_p),
        "top_k": _integer(given, "top_k", defaults.top_k),
        "repetition_penalty": _number(given, "repetition_penalty", defaults.repetition_penalty),
        "seed": _integer(given, "seed", secrets.randbits(48)) % 2**63,
    }
    try:
        return Sampling(max_new_tokens=tokens, stop=tuple(stops), **settings)
    except ConfigError as error:
        # The message begins with NAME=VALUE.
        field = str(error).partition("=")[0]
        raise RequestError(HTTPStatus.BAD_REQUEST, str(error), name if field == "max_new_tokens" else field) from None


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e6:
        raise invalid(name, "must be a number.")
    return float(value)


def _integer(given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise invalid(name, "must be an integer.")
    return value


def _prompt(messages: Any, kinds: Collection[str]) -> Prompt:
    """The conversation as an open document, with the files of its media."""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list of messages with `role` and `content`.")
    files: list[MediaFile] = []
    converted = [_message(one, f"messages[{number}]", kinds, files) for number, one in enumerate(messages)]
    try:
        return Prompt(open_parts({"messages": converted}, "messages"), files)
    except DataError as error:
        raise RequestError(HTTPStatus.BAD_REQUEST, str(error), "messages") from None


def _message(message: Any, at: str, kinds: Collection[str], files: list[MediaFile]) -> dict[str, Any]:
    """Convert a message, and append its media to `files`."""
    if not isinstance(message, dict):
        raise invalid(at, "must be an object with `role` and `content`.")
    given = {name: field for name, field in message.items() if field is not None}
    if unknown := sorted(set(given) - {"role", "content"}):
        raise invalid(f"{at}.{unknown[0]}", "not supported; a message has `role` and `content`.")
    role, content = given.get("role"), given.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{at}.content[{number}]", kinds, files) for number, part in enumerate(content)]
    elif not isinstance(content, str):
        raise invalid(f"{at}.content", "must be a text or a list of parts.")
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _part(part: Any, at: str, kinds: Collection[str], files: list[MediaFile]) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise invalid(at, "must be an object with a `type`.")
    if part["type"] == "text":
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise invalid(at, "a text part has `type` and a string `text`.")
        return {"text": part["text"]}
    converted, file = read_media_part(part, part["type"], kinds, at)
    files.append(file)
    return converted
