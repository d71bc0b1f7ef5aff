"""The connection of one process to an object store: an fsspec file system without retries of its own."""

from __future__ import annotations

import os
import threading
from typing import Any, Optional
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn

from megatron_anymal.config import StorageConfig
from megatron_anymal.object_storage.daemon_pool import DaemonPool
from megatron_anymal.object_storage.errors import StorageError

# Package of a protocol, and what installs it in a version that fits the others.
_S3, _GCS, _AIOHTTP = ("s3fs", "-e '.[s3]'"), ("gcsfs", "-e '.[gcs]'"), ("aiohttp", "aiohttp")
_PACKAGES = {"s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS, "http": _AIOHTTP, "https": _AIOHTTP}

# fsspec's own handler resets a name that its lock does not have.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


class Connection:
    """The file system of a folder, and threads for its requests, in one process.

    Raises:
        StorageError: the package for its store is not installed, or the address cannot be understood.
    """

    def __init__(self, folder: str, settings: StorageConfig):
        self.pid = os.getpid()
        # The fsspec file system.
        self.fs = _file_system(folder, settings)
        self.pool: Optional[DaemonPool] = None
        # Of this process: a fork may copy a lock that another thread holds.
        self.lock, self.count_lock = threading.Lock(), threading.Lock()

    def call(self, method: str, *arguments: Any, seconds: Optional[float], **options: Any) -> Any:
        """Call a method of the file system by its asynchronous name.

        Args:
            seconds: time limit; None: no other than those of the file system.
        """
        if self.fs.async_impl:
            coroutine = getattr(self.fs, method)
            return fsspec.asyn.sync(self.fs.loop, coroutine, *arguments, timeout=seconds, **options)
        return getattr(self.fs, method.removeprefix("_"))(*arguments, **options)


def _file_system(folder: str, settings: StorageConfig) -> Any:
    protocol = urlsplit(folder).scheme
    try:
        # Not fsspec's shared instance: settings and credentials are this one's own.
        fs, _ = fsspec.core.url_to_fs(
            folder, skip_instance_cache=True, use_listings_cache=False, **_options(protocol, settings)
        )
    except ImportError as error:
        if protocol not in _PACKAGES:
            raise StorageError(f"{folder}: {error}. Correct the address.") from None
        package, installed_by = _PACKAGES[protocol]
        raise StorageError(
            f"{folder}: addresses with {protocol}:// need the package {package}, which is not installed. Run: pip "
            f"install {installed_by}"
        ) from None
    except ValueError as error:
        raise StorageError(f"{folder}: {error}. Correct the address.") from None
    # s3fs repeats requests itself, without a limit on the time. Here it must not.
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs


def _options(protocol: str, settings: StorageConfig) -> dict[str, Any]:
    """Arguments of a file system. Those that a user gives fsspec in its own configuration apply as well."""
    if protocol in ("http", "https"):
        # Ranges are those of the file, not of a compressed one.
        return {"headers": {"Accept-Encoding": "identity"}}
    if protocol not in ("s3", "s3a"):
        return {}
    return {
        "config_kwargs": {
            "retries": {"max_attempts": 0},
            "connect_timeout": settings.timeout_seconds,
            "read_timeout": settings.timeout_seconds,
            "max_pool_connections": settings.connections,
        }
    }
