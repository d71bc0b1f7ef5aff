"""The HTTP interface: OpenAI's chat completions, the chat page, and the server's health."""

from __future__ import annotations

import secrets
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from megatron_anymal.serving.answering import AnswerResponse
from megatron_anymal.serving.errors import RequestError
from megatron_anymal.serving.media import types_of
from megatron_anymal.serving.service import Service

# Seconds after which a client that was refused for lack of room may come back.
_RETRY_AFTER = {"Retry-After": "1"}
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def build_app(service: Service) -> FastAPI:
    """The application that serves a model."""
    # Without the pages of FastAPI, which load scripts from elsewhere.
    app = FastAPI(title="megatron_anymal", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return _page()

    @app.get("/health")
    async def health() -> JSONResponse:
        return _health(service)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            message = f"there is no model {name!r}; this server has {service.name!r}."
            raise RequestError(HTTPStatus.NOT_FOUND, message, "model", "model_not_found")
        return _model(service)

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        service.admit()
        try:
            return AnswerResponse(service, *await service.open(request))
        except BaseException:
            service.release()
            raise

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, _RETRY_AFTER if error.status in _BUSY else None)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        """An unknown path or method."""
        refusal = RequestError(HTTPStatus(error.status_code), f"{request.method} {request.url.path}: {error.detail}.")
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        refusal = RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, "an error of the server; see its log.")
        return JSONResponse(refusal.body(), refusal.status)

    return app


def _model(service: Service) -> dict[str, Any]:
    """An entry of the list of models; `anymal` holds what OpenAI's format has no field for."""
    extra = {"content_parts": ["text", *types_of(service.kinds)], "max_new_tokens": service.limits.max_new_tokens}
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "anymal", "anymal": extra}


def _health(service: Service) -> JSONResponse:
    engine = service.engine
    status = "shutting down" if service.draining else "failing" if engine.broken else "ok"
    counts = {"running": engine.running, "waiting": engine.waiting, "requests": service.in_flight}
    return JSONResponse({"status": status, **counts}, 200 if status == "ok" else 503)


def _page() -> HTMLResponse:
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; img-src 'self' data: blob:; media-src data: blob:; connect-src 'self'; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(_template().replace("NONCE", nonce), headers=headers)


@cache
def _template() -> str:
    return files("megatron_anymal.serving").joinpath("templates/chat.html").read_text(encoding="utf-8")
