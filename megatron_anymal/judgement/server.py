"""The page on which annotators judge: a server on this machine's loopback interface.

Whoever has the address, which holds a random token, may read the prompts' media and judge. Every reply is JSON, the
page or a media item of a question; media are named by numbers, so a request cannot name a file.
"""

from __future__ import annotations

import hmac
import json
import secrets
from dataclasses import asdict
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, Optional
from urllib.parse import parse_qs, urlsplit

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.json_text import parse_json_text
from megatron_anymal.data.records import DataError, MediaPart, TextPart
from megatron_anymal.judgement.comparison import Comparison, annotator_name
from megatron_anymal.judgement.items import ReadablePrompt
from megatron_anymal.judgement.media import NotSatisfiable, byte_range, content_type, curves
from megatron_anymal.judgement.rubrics import RUBRICS
from megatron_anymal.modalities import MediaError

HOST = "127.0.0.1"
# Largest body of a request, in bytes: a judgement has about 300.
MAX_BODY = 16_384
# Bytes of media that are sent at a time.
_BLOCK = 2**18
_LIMITS = LimitsConfig(max_text_bytes=MAX_BODY, max_json_depth=8)


class PageRequestError(ValueError):
    """A request that is refused with an HTTP status."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class JudgementServer(ThreadingHTTPServer):
    """Serves a comparison on 127.0.0.1."""

    daemon_threads = True

    def __init__(self, comparison: Comparison, port: int = 0) -> None:
        """Listen on a port; 0 takes a free one.

        Raises:
            DataError: the port cannot be used.
        """
        self.comparison, self.token = comparison, secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise DataError(f"--port={port} cannot be used ({error}). Name another, or 0 for a free one.") from None

    @property
    def url(self) -> str:
        """Address of the page, with its token."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: JudgementServer
    protocol_version = "HTTP/1.1"
    # Seconds without data after which a connection is closed.
    timeout = 60

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged: their paths hold the token."""

    def _answer(self, handle: Any) -> None:
        """Handle a request; a refusal becomes a reply with its reason."""
        try:
            handle()
        except PageRequestError as error:
            # A body that was not read would be taken for the next request.
            self.close_connection = True
            self._send_json({"error": str(error)}, error.status)
        except (DataError, MediaError) as error:
            self.close_connection = True
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except ConnectionError:
            self.close_connection = True
        except OSError as error:
            self.close_connection = True
            self._send_json({"error": f"not saved: {error}"}, HTTPStatus.INSUFFICIENT_STORAGE)

    def _route(self) -> tuple[list[str], dict[str, str]]:
        """The path after the token, and the query.

        Raises:
            PageRequestError: the token is wrong.
        """
        url = urlsplit(self.path)
        token, *rest = url.path.removeprefix("/").split("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise PageRequestError(HTTPStatus.FORBIDDEN, "wrong token: open the address that `anymal compare` printed")
        return rest, {name: values[-1] for name, values in parse_qs(url.query).items()}

    def _get(self) -> None:
        route, query = self._route()
        comparison = self.server.comparison
        match route:
            case [] | [""]:
                self._send_page(len(route) == 0)
            case ["state"]:
                name = annotator_name(query.get("annotator"))
                rubrics = [asdict(rubric) for rubric in RUBRICS]
                state = {"annotator": name, "items": len(comparison.items), "judged": comparison.judged(name)}
                self._send_json({**state, "rubrics": rubrics})
            case ["item"]:
                name, number = annotator_name(query.get("annotator")), self._number(query.get("number"))
                question = comparison.items[number].question
                self._send_json({"turns": _turns(question), **comparison.shown(name, number)})
            case ["media", item, position]:
                self._send_media(*self._media(item, position))
            case ["curves", item, position]:
                question, part = self._media(item, position)
                self._send_json(curves(part, question.base))
            case _:
                raise PageRequestError(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> None:
        route, _ = self._route()
        if route != ["judgement"]:
            raise PageRequestError(HTTPStatus.NOT_FOUND, "there is no such page")
        # A form of another site cannot send this type.
        if self.headers.get_content_type() != "application/json":
            raise PageRequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a judgement is application/json")
        value = parse_json_text(self._body(), "the judgement", _LIMITS)
        if not isinstance(value, dict):
            raise DataError("A judgement is a JSON object.")
        annotator, comparison = annotator_name(str(value.get("annotator", ""))), self.server.comparison
        number = self._number(str(value.get("number")))
        comparison.record(annotator, number, value.get("choice"), value.get("scores"), value.get("seconds"))
        self._send_json({"judged": comparison.judged(annotator)})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise PageRequestError(HTTPStatus.LENGTH_REQUIRED, "a request needs its Content-Length")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise PageRequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a judgement has at most {MAX_BODY} bytes")
        return self.rfile.read(int(length))

    def _number(self, given: Optional[str]) -> int:
        count = len(self.server.comparison.items)
        if not given or not given.isascii() or not given.isdigit() or len(given) > 9 or int(given) >= count:
            raise PageRequestError(HTTPStatus.NOT_FOUND, f"items are numbered from 0 to {count - 1}")
        return int(given)

    def _media(self, item: str, position: str) -> tuple[ReadablePrompt, MediaPart]:
        question = self.server.comparison.items[self._number(item)].question
        if (
            not position.isascii()
            or not position.isdigit()
            or len(position) > 9
            or int(position) >= len(question.media)
        ):
            raise PageRequestError(HTTPStatus.NOT_FOUND, "the item has no such media")
        return question, question.media[int(position)]

    def _send_page(self, without_slash: bool) -> None:
        if without_slash:
            self.send_response(HTTPStatus.MOVED_PERMANENTLY)
            self.send_header("Location", f"/{self.server.token}/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; img-src 'self' data:; media-src 'self'; connect-src 'self'; base-uri 'none'; "
            f"form-action 'none'; frame-ancestors 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        )
        data = _page().replace("NONCE", nonce).encode()
        self._send(data, "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode(), "application/json", {}, status)

    def _send(self, data: bytes, kind: str, headers: dict[str, str], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send_head(status, kind, len(data), headers)
        self.wfile.write(data)

    def _send_head(self, status: HTTPStatus, kind: str, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(length), "Cache-Control": "no-store"}
        safe = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        closes = {"Connection": "close"} if self.close_connection else {}
        for name, value in {**fixed, **safe, **closes, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_media(self, question: ReadablePrompt, part: MediaPart) -> None:
        """Send a file, or the range of it that a player asks for."""
        path = question.base / part.media
        with path.open("rb") as file:
            size = path.stat().st_size
            headers = {"Accept-Ranges": "bytes", "Content-Security-Policy": "default-src 'none'; sandbox"}
            try:
                wanted = byte_range(self.headers.get("Range"), size)
            except NotSatisfiable as error:
                raise PageRequestError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, str(error)) from None
            start, end = wanted or (0, size)
            if wanted:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            status = HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK
            self._send_head(status, content_type(path), end - start, headers)
            file.seek(start)
            while start < end and (block := file.read(min(_BLOCK, end - start))):
                self.wfile.write(block)
                start += len(block)


@cache
def _page() -> str:
    return files("megatron_anymal.judgement").joinpath("templates/page.html").read_text(encoding="utf-8")


def _turns(question: ReadablePrompt) -> list[dict[str, Any]]:
    """The turns of a question for the page, with media items by number and kind."""
    turns, position = [], 0
    for turn in question.turns:
        parts: list[dict[str, Any]] = []
        for part in turn.content:
            if isinstance(part, TextPart):
                parts.append({"text": part.text})
            else:
                parts.append({"media": position, "kind": part.modality, "name": part.media.rpartition("/")[2]})
                position += 1
        turns.append({"role": turn.role, "parts": parts})
    return turns
