"""Requests to an object store, with time-outs, retries, and one renewal of credentials."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import IO, Any, Optional, TypeVar
from urllib.parse import urlsplit

import fsspec

from megatron_anymal.config import StorageConfig, is_remote, shows_credentials
from megatron_anymal.object_storage.connection import Connection
from megatron_anymal.object_storage.daemon_pool import DaemonPool
from megatron_anymal.object_storage.errors import (
    FailureKind,
    ObjectMissing,
    RequestFailure,
    ShortRead,
    StorageError,
    StoreUnavailable,
    examine,
)

# Bytes of one request. Longer ranges are read by several.
REQUEST_BYTES = 8 * 2**20
# A listing consists of several requests, each of 1,000 objects.
_LISTING_REQUESTS = 10
# Seconds between two warnings of a process about the same store.
_WARNING_INTERVAL = 10.0

_HTTP = ("http", "https")
_T = TypeVar("_T")
# Not the global generator, whose state belongs to the training's seed.
_random = random.SystemRandom()


class ObjectClient:
    """A folder on an object store. The methods are those of fsspec's file systems, and repeat what fails.

    Every process gets its own connection when it first needs one: a fork copies fsspec's file systems without the
    thread that runs their requests.

    Raises:
        StorageError: the address holds credentials, or the package for its store is not installed.
    """

    def __init__(self, folder: str, settings: Optional[StorageConfig] = None):
        self.folder, self.settings = folder.rstrip("/"), settings or StorageConfig()
        self.protocol = urlsplit(folder).scheme
        _check_address(self.folder)
        self._connection: Optional[Connection] = None
        # Of this process: requests, bytes, retries, renewals, reads, cached_blocks, read_again.
        self.counts: Counter[str] = Counter()
        self._warned = 0.0
        self.root = self._connect().fs._strip_protocol(self.folder)

    def cat_file(self, path: str, start: Optional[int] = None, end: Optional[int] = None) -> bytes:
        """Read the bytes [start, end) of an object, or all of it.

        Raises:
            ObjectMissing: there is no such object, or it ends before.
            StoreUnavailable: the store failed data.storage.attempts times.
            StorageError: access is denied, or the server ignores byte ranges.
        """
        start, end = start or 0, self.size(path) if end is None else end
        parts = range(start, end, REQUEST_BYTES)
        return b"".join(self._range(path, first, min(first + REQUEST_BYTES, end)) for first in parts)

    def info(self, path: str) -> dict[str, Any]:
        """Size in bytes and other properties of an object.

        Raises:
            StorageError: see `cat_file`.
        """
        info: dict[str, Any] = self._repeated(path, "_info", path)
        if not isinstance(info.get("size"), int):
            raise StorageError(f"{self.name(path)}: the server does not state its size. Use another server.")
        return info

    def size(self, path: str) -> int:
        """Size of an object in bytes.

        Raises:
            StorageError: see `cat_file`.
        """
        return int(self.info(path)["size"])

    def exists(self, path: str) -> bool:
        """Whether there is an object of this name.

        Raises:
            StorageError: see `cat_file`, but not ObjectMissing.
        """
        try:
            self.info(path)
        except ObjectMissing:
            return False
        return True

    def ls(self, path: str, detail: bool = True) -> list[Any]:
        """Objects and folders in a folder.

        Raises:
            StorageError: see `cat_file`.
        """
        limit = self.settings.timeout_seconds * _LISTING_REQUESTS
        listed: list[dict[str, Any]] = self._repeated(path, "_ls", path, seconds=limit, detail=True)
        inside = [entry for entry in listed if entry["name"].rstrip("/") != path.rstrip("/")]
        return inside if detail else [entry["name"] for entry in inside]

    def isdir(self, path: str) -> bool:
        """Whether a folder has contents.

        Raises:
            StorageError: see `cat_file`, but not ObjectMissing.
        """
        try:
            return bool(self.ls(path))
        except ObjectMissing:
            return False

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Sizes in bytes of those objects of the folder that exist.

        Raises:
            StorageError: see `cat_file`, but not ObjectMissing.
        """
        if self.protocol not in _HTTP:
            listed = {entry["name"].rpartition("/")[2]: entry for entry in self.ls(self.root)}
            return {name: int(listed[name]["size"]) for name in names if name in listed}
        pending = {name: self.submit(self._size_or_none, f"{self.root}/{name}") for name in names}
        sizes = {name: future.result() for name, future in pending.items()}
        return {name: size for name, size in sizes.items() if size is not None}

    def _size_or_none(self, path: str) -> Optional[int]:
        try:
            return self.size(path)
        except ObjectMissing:
            return None

    def makedirs(self, path: str, exist_ok: bool = True) -> None:
        """Check that objects can be written in a folder; object stores have no folders to create.

        Raises:
            StorageError: they cannot.
        """
        self.pipe_file(f"{path}/.writable", b"")
        # Another process that checks the same folder may have deleted it.
        with suppress(ObjectMissing):
            self.rm_file(f"{path}/.writable")

    def pipe_file(self, path: str, data: bytes) -> None:
        """Write an object.

        Raises:
            StorageError: see `cat_file`.
        """
        self._repeated(path, "_pipe_file", path, data)

    def rm_file(self, path: str) -> None:
        """Delete an object.

        Raises:
            StorageError: see `cat_file`.
        """
        self._repeated(path, "_rm_file", path)

    def mv(self, source: str, target: str) -> None:
        """Copy an object and delete the source.

        Raises:
            StorageError: see `cat_file`.
        """
        self._repeated(source, "_cp_file", source, target, seconds=None)
        self.rm_file(source)

    @contextmanager
    def open(self, path: str, mode: str) -> Iterator[IO[bytes]]:
        """Write an object through a temporary local file; it appears once it is complete.

        Raises:
            StorageError: see `cat_file`.
        """
        assert mode == "wb", f"objects are read with cat_file, not opened in mode {mode}"
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            self._repeated(path, "_put_file", file.name, path, seconds=None)
            written, size = self.size(path), os.path.getsize(file.name)
            if written != size:
                raise StorageError(f"{self.name(path)}: {written} of {size} bytes were stored. Repeat the command.")

    def submit(self, function: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Run a function in one of data.storage.connections threads.

        Raises:
            StorageError: this process has just been forked, and cannot connect; see ObjectClient.
        """
        connection = self._connect()
        with connection.lock:
            if connection.pool is None:
                connection.pool = DaemonPool(self.settings.connections)
        return connection.pool.submit(function, *arguments)

    def count(self, what: str, amount: int = 1) -> None:
        """Add to `counts`.

        Raises:
            StorageError: see `submit`.
        """
        with self._connect().count_lock:
            self.counts[what] += amount

    def name(self, path: str) -> str:
        """Address of an object, for messages."""
        return f"{self.folder}{path.removeprefix(self.root)}"

    def _range(self, path: str, start: int, stop: int) -> bytes:
        return self._repeated(path, "_cat_file", path, start=start, end=stop, expected=stop - start)

    def _connect(self) -> Connection:
        if self._connection is None or self._connection.pid != os.getpid():
            self._connection = Connection(self.folder, self.settings)
        return self._connection

    def _repeated(self, path: str, method: str, *arguments: Any, expected: Optional[int] = None, **options: Any) -> Any:
        """Call a method of the file system until it succeeds, fails for good, or data.storage.attempts are used up."""
        failures, renewed = 0, False
        while True:
            connection = self._connect()
            self.count("requests")
            try:
                result = connection.call(method, *arguments, **{"seconds": self.settings.timeout_seconds, **options})
                self._check_length(path, result, expected)
                return result
            except StorageError:
                raise
            except Exception as error:
                failure, cause = examine(error), error
            if failure.fault is FailureKind.ACCESS and not renewed:
                renewed = True
                self._renew(connection)
                continue
            failures += 1
            if failure.fault is not FailureKind.PASSING or failures >= self.settings.attempts:
                raise self._error(path, failure) from cause
            self._note_retry(path, failure, failures)
            # Exponential back-off with jitter, so that ranks do not return all at once.
            time.sleep(self.settings.pause(failures) * _random.uniform(0.5, 1.0))

    def _check_length(self, path: str, result: Any, expected: Optional[int]) -> None:
        if not isinstance(result, bytes):
            return
        self.count("bytes", len(result))
        if expected is None or len(result) == expected:
            return
        if self.protocol in _HTTP and len(result) > expected:
            raise StorageError(
                f"{self.name(path)}: the server ignores byte ranges: it sent {len(result)} bytes instead of "
                f"{expected}. Serve the folder with a server that supports range requests."
            )
        raise ShortRead(len(result), expected)

    def _renew(self, rejected: Connection) -> None:
        """Look for credentials again, unless another thread has done so since."""
        with rejected.lock:
            if self._connection is rejected:
                self.count("renewals")
                fresh = Connection(self.folder, self.settings)
                fresh.pool = rejected.pool
                self._connection = fresh

    def _note_retry(self, path: str, failure: RequestFailure, failures: int) -> None:
        self.count("retries")
        now = time.monotonic()
        if failures > 1 and now - self._warned > _WARNING_INTERVAL:
            self._warned = now
            attempts = f"attempt {failures} of {self.settings.attempts}"
            print(f"warning: {self.name(path)}: {failure.reason}; {attempts} failed", file=sys.stderr, flush=True)

    def _error(self, path: str, failure: RequestFailure) -> StorageError:
        name, reason = self.name(path), failure.reason
        if failure.fault is FailureKind.MISSING:
            what = "is shorter than stated" if "416" in reason else "does not exist"
            return ObjectMissing(f"{name} {what} ({reason}). Correct the address, or restore the object.")
        if failure.expired:
            return StorageError(
                f"{name}: the store rejects the credentials as expired or unknown ({reason}), and no newer ones were "
                "found. Renew them, then start the command again: a run continues from its newest checkpoint."
            )
        if failure.fault is FailureKind.ACCESS:
            return StorageError(
                f"{name}: access is denied ({reason}). Check that this node finds credentials (environment, profile "
                "or instance role), and that they may read and list this folder."
            )
        if failure.fault is FailureKind.PASSING:
            return StoreUnavailable(
                f"{name}: {self.settings.attempts} attempts failed, the last with: {reason}. Check the store and the "
                "network, or raise data.storage.attempts or data.storage.timeout_seconds."
            )
        return StorageError(f"{name}: the request failed ({reason}). Check the address, the region and the endpoint.")


def file_system(folder: str) -> tuple[Any, str]:
    """The file system of a folder and the folder's path in it: an ObjectClient unless the folder is local.

    It has the default settings. Repeated calls share a client, since a connection takes a tenth of a second to make.

    Raises:
        StorageError: see ObjectClient.
    """
    if not is_remote(folder):
        fs, root = fsspec.core.url_to_fs(folder.rstrip("/"))
        return fs, root
    client = _client(folder.rstrip("/"))
    return client, client.root


@lru_cache(maxsize=4)
def _client(folder: str) -> ObjectClient:
    return ObjectClient(folder)


def _check_address(folder: str) -> None:
    if shows_credentials(folder):
        parts = urlsplit(folder)
        raise StorageError(
            f"The address of {parts.scheme}://{parts.hostname} holds credentials or a query, which logs would show. "
            "Remove them: credentials are found in the environment, a profile or the instance's role."
        )
