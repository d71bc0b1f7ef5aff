"""Replies to chat completions, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Optional

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from megatron_anymal.integrity.sentences import SentenceGate
from megatron_anymal.serving.engine import AnswerState, Ticket
from megatron_anymal.serving.errors import RequestError
from megatron_anymal.serving.requests import ChatRequest
from megatron_anymal.serving.service import Service

_LOG = logging.getLogger(__name__)
_FAILURES = {
    "failed": RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, "computing the answer failed; see the server's log."),
    "shutdown": RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the server shut down.", code="shutting_down"),
}
_FILTERED = "content_filter"


class AnswerResponse(Response):
    """The reply to a request in the engine. Frees its place once it is sent, or the client leaves or is stuck."""

    def __init__(self, service: Service, chat: ChatRequest, ticket: Ticket):
        """Prepare the reply to an admitted request."""
        super().__init__()
        self._service, self._chat, self._ticket = service, chat, ticket
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        # Lets checked sentences through; None: everything passes as it comes.
        self._gate = service.checks.gate(chat.prompt) if service.checks else None
        # Characters that the gate was given.
        self._given = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self._chat.stream:
                await self._stream(self._patient(send))
            else:
                await (await self._whole())(scope, receive, self._patient(send))
        except TimeoutError:
            # Returning without the end of the reply closes the connection.
            _LOG.warning(
                "a client has read nothing for %g s; its request is cancelled", self._service.limits.client_timeout
            )
        finally:
            watcher.cancel()
            self._service.engine.cancel(self._ticket)
            self._service.release()

    async def _watch(self, receive: Receive) -> None:
        """Give the request up as soon as its client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._service.engine.cancel(self._ticket)

    def _patient(self, send: Send) -> Callable[[Message], Awaitable[None]]:
        """`send` that raises TimeoutError if the client reads nothing."""

        async def limited(message: Message) -> None:
            async with asyncio.timeout(self._service.limits.client_timeout):
                await send(message)

        return limited

    async def _whole(self) -> Response:
        progress = await self._ticket.next()
        if failure := _FAILURES.get(progress.finish):
            return JSONResponse(failure.body(), failure.status)
        text = await self._allowed(progress)
        rejection = self._gate and self._gate.rejection
        message = {"role": "assistant", "content": None if rejection else text}
        message["refusal"] = rejection.text if rejection else None
        finish = _FILTERED if rejection else progress.finish
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return JSONResponse({**self._head("chat.completion"), "choices": [choice], "usage": self._usage(progress)})

    async def _stream(self, send: Callable[[Message], Awaitable[None]]) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        # Asks nginx not to collect the stream.
        headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(value: Any, *, more: bool = True) -> None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

        await event(self._chunk({"role": "assistant", "content": ""}))
        written, progress = 0, AnswerState("", 0, "")
        while not progress.finish and not (self._gate and self._gate.rejection):
            progress = await self._ticket.next()
            if progress.finish == "cancelled":
                return
            if failure := _FAILURES.get(progress.finish):
                await event(failure.body(), more=False)
                return
            text = await self._allowed(progress)
            if new := text[written:]:
                await event(self._chunk({"content": new}))
                written = len(text)
        if self._gate and (rejection := self._gate.rejection):
            await event(self._chunk({"refusal": rejection.text}))
            await event(self._chunk({}, _FILTERED))
        else:
            await event(self._chunk({}, progress.finish))
        if self._chat.include_usage:
            head = self._head("chat.completion.chunk")
            await event({**head, "choices": [], "usage": self._usage(progress)})
        await event("[DONE]", more=False)

    async def _allowed(self, progress: AnswerState) -> str:
        """The text that may be sent: without surrounding white space, as `anymal generate` prints it."""
        text = progress.text.strip()
        return await asyncio.to_thread(self._passed, self._gate, text, bool(progress.finish)) if self._gate else text

    def _passed(self, gate: SentenceGate, text: str, done: bool) -> str:
        """What has passed the checks of an answer that has grown to `text`."""
        gate.add(text[self._given :])
        self._given = len(text)
        if done:
            gate.finish()
        return gate.released

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._service.name}

    def _chunk(self, delta: dict[str, str], finish: Optional[str] = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _usage(self, progress: AnswerState) -> dict[str, int]:
        prompt, answer = len(self._ticket.running.prompt), progress.tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
