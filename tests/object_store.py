"""A real S3 server on loopback for tests, with faults on request; see object_store_process.py."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

# What a client of the server needs in its environment.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIATESTS",
    "AWS_SECRET_ACCESS_KEY": "of-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "bucket"


@dataclass(frozen=True)
class ObjectStore:
    """A running server."""

    # Its address.
    url: str
    # The folder behind /files and /plain.
    files: Path

    def fail(self, object: str = "", kind: str = "", times: int = 1, **details: Any) -> None:
        """Fail the next requests for an object, replacing earlier faults; without arguments, fail none. Clears the log.

        Args:
            object: end of the request's path.
            kind: slow, short, cut, damaged, or one of object_store_process.ERRORS.
            times: number of requests.
            details: `seconds` of a slow answer; `methods`; `key`, to fail only requests signed with it.
        """
        faults = [{"object": object, "kind": kind, "times": times, **details}] if kind else []
        body = json.dumps(faults).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/control", data=body), timeout=240).read()

    def log(self, object: str = "", method: str = "GET") -> list[str]:
        """Byte ranges of the requests for an object since the last call of `fail`."""
        entries = json.loads(urllib.request.urlopen(f"{self.url}/control", timeout=240).read())
        return [e["range"] for e in entries if e["path"].endswith(object) and e["method"] == method]

    def upload(self, folder: str, name: str, bucket: str = BUCKET) -> str:
        """Copy a local folder to a bucket; returns its address. The environment must have ENVIRONMENT."""
        fs = fsspec.filesystem("s3", endpoint_url=self.url, skip_instance_cache=True)
        fs.makedirs(bucket, exist_ok=True)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                fs.put_file(str(path), f"{bucket}/{name}/{path.relative_to(folder)}")
        return f"s3://{bucket}/{name}"


@contextmanager
def object_store(files: Path) -> Iterator[ObjectStore]:
    """Start a server in a process of its own, which ends with the block or with this process."""
    program = Path(__file__).with_name("object_store_process.py")
    command = [sys.executable, str(program), str(files)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield ObjectStore(f"http://127.0.0.1:{port}", files)
        finally:
            process.kill()
