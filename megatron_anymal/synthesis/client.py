"""Requests to an OpenAI-compatible server, repeated until they are answered."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from dataclasses import dataclass
from typing import Any, Optional
from urllib.parse import urlsplit

import httpx

from megatron_anymal.config import ConfigError
from megatron_anymal.data.records import DataError

# Statuses after which the same request may succeed; others of 400 to 499 are the request's fault.
_RETRIED = (408, 409, 425, 429)
# Longest wait before a repetition, in seconds, and longest that a server may ask for.
_LONGEST, _LONGEST_ASKED = 60.0, 600.0


class ServerFailed(ValueError):
    """A request that was not answered after all repetitions."""


class Refused(ValueError):
    """A request that the server refuses for its content."""


@dataclass(frozen=True)
class ChatReply:
    """The answer to a request."""

    # Text of the answer.
    text: str
    # Whether it ends because of the limit on its length.
    cut_off: bool
    # Tokens of the request, as the server counts them.
    prompt_tokens: int
    # Tokens of the answer.
    completion_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """A server and how it is asked.

    Raises:
        ConfigError: a value out of range.
    """

    # Address, with or without /v1.
    url: str
    # Name of the model.
    model: str
    # Sent as a bearer token; None: none.
    api_key: Optional[str] = None
    # Seconds for one request.
    timeout: float = 120.0
    # Repetitions of a failed request.
    retries: int = 6
    # Seconds before the first repetition, doubled for each further one.
    backoff: float = 1.0
    # Sampling of the server.
    temperature: float = 0.7
    # Longest answer in tokens.
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise ConfigError(f"--server {self.url!r} must be an address such as http://localhost:8000.")
        if self.timeout <= 0 or self.retries < 0 or self.backoff < 0 or self.temperature < 0 or self.max_tokens < 1:
            raise ConfigError("--timeout, --max-tokens must be positive, --retries, --temperature at least 0.")

    @property
    def completions(self) -> str:
        """Address of the chat completions."""
        base = self.url.rstrip("/")
        return f"{base}/chat/completions" if urlsplit(base).path else f"{base}/v1/chat/completions"


class Client:
    """Asks a server; any number of tasks of one event loop may use it."""

    def __init__(self, endpoint: Endpoint, http: httpx.AsyncClient) -> None:
        self._endpoint, self._http = endpoint, http
        # Whether the server takes `response_format`; it is left out once a request with it is refused.
        self.json_mode = True
        # Requests that were repeated, by reason.
        self.repeated: dict[str, int] = {}
        # Requests that were answered.
        self.answered = 0

    async def ask(self, messages: list[dict[str, str]], format: dict[str, Any]) -> ChatReply:
        """Send a request until it is answered.

        Raises:
            ServerFailed: every repetition failed as well.
            Refused: the server refuses the content of the request.
            DataError: the server refuses the key, the address or the model.
        """
        attempt = 0
        while True:
            try:
                reply = await self._once(messages, format)
            except _Repeat as failure:
                self.repeated[failure.reason] = self.repeated.get(failure.reason, 0) + 1
                if attempt == self._endpoint.retries:
                    raise ServerFailed(failure.reason) from None
                await asyncio.sleep(self._wait(attempt, failure.after))
                attempt += 1
                continue
            self.answered += 1
            return reply

    def _wait(self, attempt: int, asked: Optional[float]) -> float:
        """Seconds before a repetition: those that the server asks for, else exponential with jitter."""
        if asked is not None:
            return min(asked, _LONGEST_ASKED)
        return min(self._endpoint.backoff * 2**attempt, _LONGEST) * random.uniform(0.5, 1.0)

    async def _once(self, messages: list[dict[str, str]], format: dict[str, Any]) -> ChatReply:
        """One request; a second one without `response_format` if the server refuses that."""
        if not self.json_mode:
            return await self._post(messages, None)
        try:
            return await self._post(messages, format)
        except Refused:
            reply = await self._post(messages, None)
            self.json_mode = False
            return reply

    async def _post(self, messages: list[dict[str, str]], format: Optional[dict[str, Any]]) -> ChatReply:
        endpoint = self._endpoint
        body: dict[str, Any] = {
            "model": endpoint.model,
            "messages": messages,
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
        }
        if format is not None:
            body["response_format"] = format
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        try:
            async with asyncio.timeout(endpoint.timeout):
                response = await self._http.post(endpoint.completions, json=body, headers=headers)
        except (TimeoutError, httpx.TimeoutException):
            raise _Repeat("timeout") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Repeat(f"connection: {type(error).__name__}") from None
        self._check_status(response)
        return _reply(response)

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        if status in _RETRIED or status >= 500:
            raise _Repeat(f"status {status}", _retry_after(response.headers.get("Retry-After")))
        reason = " ".join(response.text[:300].split())
        if self._endpoint.api_key:
            reason = reason.replace(self._endpoint.api_key, "***")
        if status in (400, 413, 422):
            raise Refused(f"status {status}: {reason}")
        raise DataError(
            f"The server refuses the request with status {status} ({reason or 'no reason'}). Check --server, --model "
            "and the key in the variable of --api-key-env."
        )


class _Repeat(Exception):
    """A failure that may be transient."""

    def __init__(self, reason: str, after: Optional[float] = None) -> None:
        super().__init__(reason)
        self.reason, self.after = reason, after


def _retry_after(header: Optional[str]) -> Optional[float]:
    """Seconds of a Retry-After header, which is a number or a date; None if it is neither."""
    if header is None:
        return None
    if header.strip().isascii() and header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _reply(response: httpx.Response) -> ChatReply:
    try:
        value = response.json()
        choice, usage = value["choices"][0], value.get("usage") or {}
        text = choice["message"]["content"] or ""
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _Repeat("garbage instead of a completion") from None
    return ChatReply(text, choice.get("finish_reason") == "length", *tokens)
