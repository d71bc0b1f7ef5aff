"""A small chat-completions server that misbehaves on request, and counts the requests it gets."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from server_thread import in_thread


def good(key: str, pairs: int = 2) -> str:
    """A valid answer about a sample."""
    turns = [{"question": f"What is in {key}, part {n}?", "answer": f"Part {n} of {key}."} for n in range(pairs)]
    return json.dumps({"conversation": turns})


class ChatServer(ThreadingHTTPServer):
    """Answers `good(key)`, where the key is the word `sample-N` in a request, unless a script says otherwise.

    Attributes:
        script: key -> what happens to its first requests: `text:...` (an answer with this text), `raw:...` (a body),
            a status, optionally with a Retry-After (`429:0.1`), `cut` (the connection ends within the body), `reset`
            (before the reply), `stall` (silence until the client gives up), `drip` (a byte now and then, as long),
            `long` (cut off).
        asked: requests by key.
        complete: complete valid replies by key.
        bodies: the requests.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0, script: dict[str, list[str]] | None = None, json_mode: bool = True) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.script, self.json_mode = script or {}, json_mode
        self.asked: Counter[str] = Counter()
        self.complete: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self.busiest = self.busy = 0
        self.delay = 0.0
        # After this many complete replies it only resets connections.
        self.lives = 10**9
        self.times: dict[str, list[float]] = {}

    def handle_error(self, request: Any, address: Any) -> None:
        """Clients that no longer listen are expected."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"
    timeout = 240

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        [key] = re.findall(r"sample-\d+", body["messages"][-1]["content"])
        with server.lock:
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            number = server.asked[key]
            server.asked[key] += 1
            server.times.setdefault(key, []).append(time.monotonic())
            server.bodies.append({"path": self.path, **body})
            server.keys.add(self.headers.get("Authorization", ""))
        try:
            time.sleep(server.delay)
            if sum(server.complete.values()) >= server.lives:
                self.reset()
            elif not server.json_mode and "response_format" in body:
                self.reply(400, b'{"error": "response_format is not supported"}')
            else:
                steps = server.script.get(key, [])
                self.act(steps[number] if number < len(steps) else "", key)
        finally:
            with server.lock:
                server.busy -= 1

    def act(self, step: str, key: str) -> None:
        kind, _, rest = step.partition(":")
        if kind in ("", "text", "long"):
            self.complete(rest or good(key), "length" if kind == "long" else "stop", key if not kind else "")
        elif kind == "raw":
            self.reply(200, rest.encode())
        elif kind == "stall":
            self.rfile.read(1)
            self.reset()
        elif kind == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(900):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            self.reset()
        elif kind == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.reset()
        elif kind == "reset":
            self.reset()
        else:
            self.reply(int(kind), b"{}", {"Retry-After": rest} if rest else {})

    def complete(self, text: str, finish: str, key: str) -> None:
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
        usage = {"prompt_tokens": 10, "completion_tokens": 3}
        if key:
            with self.server.lock:
                self.server.complete[key] += 1
        self.reply(200, json.dumps({"choices": [choice], "usage": usage}).encode())

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def reset(self) -> None:
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@contextmanager
def serving(**arguments: Any) -> Iterator[ChatServer]:
    """A server that runs in threads of this process."""
    with in_thread(ChatServer(**arguments)) as server:
        yield server
