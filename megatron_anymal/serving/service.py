"""What the server's handlers share: admission of requests, reading them, and the engine that answers them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Optional

from starlette.requests import ClientDisconnect, Request

from megatron_anymal.config import ConfigError, LimitsConfig
from megatron_anymal.data.json_text import parse_json_text
from megatron_anymal.data.records import DataError
from megatron_anymal.generation.generator import Generator
from megatron_anymal.generation.running_batch import RunningPrompt
from megatron_anymal.integrity.checks import Checks
from megatron_anymal.modalities import MediaError
from megatron_anymal.serving.engine import Engine, Ticket, too_long
from megatron_anymal.serving.errors import RequestError
from megatron_anymal.serving.limits import ServingLimits
from megatron_anymal.serving.requests import ChatRequest, read_request

# Threads that decode media.
_READERS = 2
# Bytes per second below which a client takes longer than its time for a request's body.
_SLOWEST = 2**16
_DEPTH = 32


class Service:
    """A served model.

    Attributes:
        draining: set once no new requests are accepted.
        in_flight: accepted requests whose replies have not been sent completely.
    """

    def __init__(self, generator: Generator, name: str, limits: ServingLimits, checks: Optional[Checks] = None) -> None:
        """Start the engine of a model.

        Args:
            name: of the model, in requests.
            checks: reject prompts before they are computed, and end answers before a sentence that violates.
        """
        self.name, self.limits, self.checks = name, limits, checks
        self.kinds: Collection[str] = generator.kinds
        self.created = int(time.time())
        self.draining, self.in_flight = False, 0
        self._batch = generator.running_batch()
        self.engine = Engine(self._batch, limits.max_batch, limits.max_cache_tokens)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")

    def close(self) -> None:
        """End the engine and the readers; requests that are not answered end with an error."""
        self.engine.stop()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def admit(self) -> None:
        """Count a request in; `release` counts it out.

        Raises:
            RequestError: with status 503 if the server shuts down, 429 if too many requests are waiting.
        """
        if self.draining:
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down.", code="shutting_down")
        if self.in_flight >= self.limits.max_batch + self.limits.max_queue:
            raise RequestError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{self.limits.max_batch} requests are being answered, {self.limits.max_queue} wait. Try again later.",
                code="queue_full",
            )
        self.in_flight += 1

    def release(self) -> None:
        """Count a request out."""
        self.in_flight -= 1

    async def open(self, request: Request) -> tuple[ChatRequest, Ticket]:
        """Read an admitted request, and let the engine answer it.

        Raises:
            RequestError: it cannot be answered.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A form of another site cannot send this type.
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be application/json.")
        body = await self._body(request)
        loop = asyncio.get_running_loop()
        chat, running = await loop.run_in_executor(self._readers, self._read, body)
        ticket = Ticket(running, watched=chat.stream)
        self.engine.submit(ticket)
        return chat, ticket

    async def _body(self, request: Request) -> bytes:
        limit, body = self.limits.max_body_bytes, bytearray()
        declared = request.headers.get("content-length", "")
        too_large = RequestError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {limit / 2**20:g} MiB (--max-body-mb)."
        )
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
            raise too_large
        deadline = asyncio.get_running_loop().time() + self.limits.client_timeout
        try:
            async with asyncio.timeout_at(deadline) as patience:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
                    patience.reschedule(deadline + len(body) / _SLOWEST)
        except TimeoutError:
            raise RequestError(HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive in time.") from None
        except ClientDisconnect:
            raise RequestError(HTTPStatus.BAD_REQUEST, "the client left before its request was complete.") from None
        return bytes(body)

    def _read(self, body: bytes) -> tuple[ChatRequest, RunningPrompt]:
        """Convert a body to a prompt that can join the batch; in a reader's thread."""
        limits = LimitsConfig(max_text_bytes=self.limits.max_body_bytes, max_json_depth=_DEPTH)
        try:
            value = parse_json_text(body, "the body", limits)
            chat = read_request(value, self.name, self.kinds, self.limits.max_new_tokens)
            if self.checks and (rejection := self.checks.check_prompts([chat.prompt])[0]):
                raise RequestError(HTTPStatus.BAD_REQUEST, rejection.text, "messages", "content_policy_violation")
            running = self._batch.read(chat.prompt, chat.sampling)
        except RequestError:
            raise
        except (DataError, MediaError, ConfigError) as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error), "messages") from None
        if reason := too_long(running, self.engine):
            raise RequestError(HTTPStatus.BAD_REQUEST, f"messages: {reason}", "messages", "context_length_exceeded")
        return chat, running
