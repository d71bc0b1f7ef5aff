"""Refusals of requests, in the wire format of OpenAI's API."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Optional


class RequestError(ValueError):
    """A request that is not answered.

    Attributes:
        status: the HTTP status.
        param: the field at fault; None if it is not a single one.
        code: for programs; None if the status says enough.
    """

    def __init__(self, status: HTTPStatus, message: str, param: Optional[str] = None, code: Optional[str] = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body of the reply."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: Optional[str] = None) -> RequestError:
    """A field that cannot be used: status 400."""
    return RequestError(HTTPStatus.BAD_REQUEST, f"{param}: {message}", param, code)
