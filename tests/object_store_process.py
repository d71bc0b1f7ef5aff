"""An S3 server (moto) and an HTTP file server on loopback, in one process of their own, that fail on request.

/BUCKET/KEY          S3
/files/PATH          files of the folder that was named on the command line, with byte ranges
/plain/PATH          the same without byte ranges
/control             GET: all requests since the last POST. POST: a list of faults, which replaces the earlier ones
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

# Fault -> status and S3's code.
ERRORS = {
    "slow_down": (503, "SlowDown"),
    "server_error": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
}


class Server:
    """The WSGI application."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._s3 = folder, DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._log: list[dict[str, Any]] = []
        self._faults: list[dict[str, Any]] = []

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Answer a request."""
        request = Request(environ)
        if request.path == "/control":
            return self._control(request)(environ, start_response)
        fault = self._next_fault(request)
        if fault.get("kind") in ERRORS:
            status, code = ERRORS[fault["kind"]]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>of a test</Message></Error>"
            return Response(text, status, mimetype="application/xml")(environ, start_response)
        if fault.get("kind") == "slow":
            time.sleep(fault["seconds"])
        response = Response.from_app(self._answer, environ, buffered=True)
        return self._spoiled(response, fault)(environ, start_response)

    def _control(self, request: Request) -> Response:
        with self._lock:
            if request.method == "POST":
                self._faults, self._log = json.loads(request.get_data()), []
            return Response(json.dumps(self._log), mimetype="application/json")

    def _next_fault(self, request: Request) -> dict[str, Any]:
        """Log a request, and take a fault for it: the first that matches and is not used up."""
        signature = request.headers.get("Authorization", "")
        entry = {"method": request.method, "path": request.path, "range": request.headers.get("Range", "")}
        with self._lock:
            self._log.append(entry)
            for fault in self._faults:
                only_key = fault.get("key", "")
                methods = fault.get("methods", ["GET"])
                matches = request.path.endswith(fault["object"]) and request.method in methods
                if matches and only_key in signature and fault["times"] > 0:
                    fault["times"] -= 1
                    return fault
        return {}

    def _answer(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        root, _, path = request.path.lstrip("/").partition("/")
        if root not in ("files", "plain"):
            return self._s3(environ, start_response)
        file = self._folder / path
        if not file.is_file():
            return Response("", 404)(environ, start_response)
        if root == "plain":
            return Response(file.read_bytes(), headers={"Accept-Ranges": "none"})(environ, start_response)
        return send_file(file, environ, conditional=True)(environ, start_response)

    def _spoiled(self, response: Response, fault: dict[str, Any]) -> Response:
        kind, data = fault.get("kind"), response.get_data() if fault else b""
        if kind == "short":
            response.set_data(data[: len(data) // 2])
        elif kind == "damaged":
            response.set_data(data[:-1] + bytes([data[-1] ^ 1]))
        elif kind == "cut":
            response.response = _cut(data[: len(data) // 2])
            response.headers["Content-Length"] = str(len(data))
        return response


def _cut(data: bytes) -> Iterable[bytes]:
    yield data
    raise ConnectionResetError("of a test")


class _Quiet(WSGIRequestHandler):
    # Connections are kept open, as real stores do.
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Log nothing."""


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Server(Path(sys.argv[1])), threaded=True, request_handler=_Quiet)
    print(server.server_port, flush=True)
    # Ends with the tests' process, which holds the other end.
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
    server.serve_forever()
