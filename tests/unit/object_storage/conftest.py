"""An S3 server for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import ENVIRONMENT, ObjectStore, object_store

from megatron_anymal.config import StorageConfig, data_section


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A server that all tests of this process share."""
    with object_store(tmp_path_factory.mktemp("files")) as store:
        yield store


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The server without faults, found through the environment, with short pauses between attempts."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(data_section, "FIRST_PAUSE", 0.01)
    server.fail()
    return server


@pytest.fixture
def settings(tmp_path: Path) -> StorageConfig:
    """Settings with a cache folder of the test's own, without cached blocks."""
    return StorageConfig(cache_folder=str(tmp_path / "cache"), attempts=4, timeout_seconds=20.0)


@pytest.fixture(scope="session")
def uploaded(server: ObjectStore, mixed_shards: str) -> str:
    """Address of the mixed shards on the server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        return server.upload(mixed_shards, "mixed")
