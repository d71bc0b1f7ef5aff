"""Errors of object stores: which are transient, which are permanent, and the message for the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

# Codes of S3 for credentials that may be replaced by newer ones.
_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
# Errors of botocore, google-auth and aiobotocore that come before a request is sent.
_NO_CREDENTIALS = {
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "RefreshError",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_PASSING_CODES = {"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
_PASSING_STATUS = {408, 425, 429}
# Connections that cannot be made, are cut, or end early. They have no common base class.
_PASSING_CLASSES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
}
_CERTIFICATE = {"ClientConnectorCertificateError", "SSLCertVerificationError"}


class StorageError(ValueError):
    """An object that cannot be read or written. The message names the store, the object and the fix."""


class StoreUnavailable(StorageError):
    """A store that did not answer, or not completely, in as many attempts as allowed."""

    # resilience.exit_codes.Exit.CRASH: a restart may find the store available again.
    exit_code = 1


class ObjectMissing(StorageError):
    """An object that does not exist, or that is shorter than stated."""


class ShortRead(Exception):
    """A response of the wrong length."""

    def __init__(self, received: int, expected: int):
        super().__init__(f"{received} bytes instead of {expected}")


class FailureKind(Enum):
    """What a failed request means for the next attempt."""

    PASSING = auto()
    ACCESS = auto()
    MISSING = auto()
    FINAL = auto()


@dataclass(frozen=True)
class RequestFailure:
    """A failed request."""

    # What it means for the next attempt.
    fault: FailureKind
    # Status and code of the store, or the kind of error, such as "503 SlowDown"; never the store's own text.
    reason: str

    @property
    def expired(self) -> bool:
        """Whether the store rejects the credentials as outdated or unknown."""
        return self.fault is FailureKind.ACCESS and any(code in self.reason for code in _CREDENTIALS)


def examine(error: BaseException) -> RequestFailure:
    """Classify an error of an fsspec file system."""
    chain = list(_chain(error))
    classes = {base.__name__ for one in chain for base in type(one).__mro__}
    status, code = next((response for one in chain if any(response := _response(one))), (0, ""))
    reason = " ".join(dict.fromkeys(filter(None, (str(status or ""), code))))
    if classes & _NO_CREDENTIALS:
        return RequestFailure(FailureKind.ACCESS, "no credentials")
    if code in _CREDENTIALS or status in (401, 403) or isinstance(error, PermissionError):
        return RequestFailure(FailureKind.ACCESS, reason or "permission denied")
    # The answer to a HEAD request has no body, hence no code; S3 sends 400 for an expired token.
    if status == 400 and code in ("", "400", "Bad Request"):
        return RequestFailure(FailureKind.ACCESS, reason)
    if status in (404, 410, 416) or isinstance(error, FileNotFoundError):
        return RequestFailure(FailureKind.MISSING, reason or "not found")
    if isinstance(error, ShortRead):
        return RequestFailure(FailureKind.PASSING, str(error))
    if code in _PASSING_CODES or status in _PASSING_STATUS or status >= 500:
        return RequestFailure(FailureKind.PASSING, reason)
    if isinstance(error, TimeoutError) or "TimeoutError" in classes:
        return RequestFailure(FailureKind.PASSING, "time-out")
    if classes & _PASSING_CLASSES and not classes & _CERTIFICATE and not status:
        return RequestFailure(FailureKind.PASSING, f"connection failed ({type(chain[-1]).__name__})")
    return RequestFailure(FailureKind.FINAL, reason or type(error).__name__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _response(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code in an error of botocore, aiohttp or gcsfs; (0, "") if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return int(status or 0), _plain(response.get("Error", {}).get("Code", ""))
    # aiohttp marks an answer that it cannot parse with the status 400, which no server sent.
    parsing = any(base.__name__ == "HttpProcessingError" for base in type(error).__mro__)
    for name in () if parsing else ("status", "code"):
        number = getattr(error, name, None)
        if isinstance(number, int) and 400 <= number < 600:
            return number, ""
    return 0, ""


def _plain(code: object) -> str:
    """The server chooses the code: keep what an error code consists of."""
    return re.sub(r"[^\w .-]", "", str(code))[:40]
