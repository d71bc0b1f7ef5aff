"""Requests to an object store succeed in spite of faults that pass, and name the object and the fix of others."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import fsspec
import pytest
from object_store import BUCKET, ObjectStore

from megatron_anymal.config import StorageConfig, data_section
from megatron_anymal.log_filters import quiet_libraries
from megatron_anymal.object_storage.client import REQUEST_BYTES, ObjectClient, file_system
from megatron_anymal.object_storage.errors import FailureKind, ObjectMissing, StorageError, StoreUnavailable, examine
from megatron_anymal.resilience.exit_codes import Exit, code_of, is_users

DATA = bytes(range(256)) * 100


@pytest.fixture
def folder(store: ObjectStore) -> str:
    """A folder with one object."""
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.makedirs(BUCKET, exist_ok=True)
    fs.pipe_file(f"{BUCKET}/client/object", DATA)
    return f"s3://{BUCKET}/client"


@pytest.fixture
def client(folder: str, settings: StorageConfig) -> ObjectClient:
    return ObjectClient(folder, settings)


def test_processes_that_check_the_same_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may delete the object of this one's check; not every store accepts deleting it again."""
    client = ObjectClient("memory://checked")
    pipe_file = client.pipe_file

    def written_and_deleted(path: str, data: bytes) -> None:
        pipe_file(path, data)
        client.rm_file(path)

    monkeypatch.setattr(client, "pipe_file", written_and_deleted)
    client.makedirs(f"{client.root}/index")


@pytest.mark.parametrize("kind", ["slow_down", "server_error", "cut", "short"])
def test_faults_that_pass(store: ObjectStore, client: ObjectClient, kind: str) -> None:
    store.fail("client/object", kind, times=2)
    assert client.cat_file(f"{client.root}/object", 100, 1300) == DATA[100:1300]
    assert store.log("client/object") == ["bytes=100-1299"] * 3
    assert (client.counts["requests"], client.counts["retries"]) == (3, 2)


def test_slow_answer(store: ObjectStore, folder: str, settings: StorageConfig) -> None:
    """On a busy machine, later attempts may be slow as well."""
    settings.timeout_seconds, settings.attempts = 0.5, 20
    client = ObjectClient(folder, settings)
    store.fail("client/object", "slow", seconds=3)
    assert client.cat_file(f"{client.root}/object", 5, 8) == DATA[5:8]
    assert client.counts["retries"] >= 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("slow_down", "503 SlowDown"), ("short", "5 bytes instead of 10"), ("cut", "connection failed")],
)
def test_store_that_stays_down(
    store: ObjectStore, client: ObjectClient, kind: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    store.fail("client/object", kind, times=100)
    with pytest.raises(StoreUnavailable, match=rf"s3://bucket/client/object: 4 attempts failed, .*: {reason}"):
        client.cat_file(f"{client.root}/object", 0, 10)
    assert len(store.log("client/object")) == 4
    assert f"warning: s3://bucket/client/object: {reason}" in capfd.readouterr().err


@pytest.mark.parametrize(("kind", "requests"), [("denied", 2), ("expired", 2)])
def test_access_is_denied(store: ObjectStore, client: ObjectClient, kind: str, requests: int) -> None:
    """One attempt to find other credentials, and no further ones."""
    store.fail("client/object", kind, times=100)
    fix = {"denied": "Check that this node finds credentials", "expired": "Renew them"}[kind]
    with pytest.raises(StorageError, match=rf"^s3://bucket/client/object: .*{fix}") as error:
        client.cat_file(f"{client.root}/object", 0, 10)
    assert len(store.log("client/object")) == requests and client.counts["renewals"] == 1
    assert not isinstance(error.value, StoreUnavailable)
    for secret in ("AKIATESTS", "of-tests"):
        assert secret not in str(error.value)


def test_credentials_are_renewed(
    store: ObjectStore, folder: str, settings: StorageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_text("[default]\naws_access_key_id = AKIAOLD\naws_secret_access_key = old\n")
    client = ObjectClient(folder, settings)
    assert client.cat_file(f"{client.root}/object", 0, 10) == DATA[:10]
    store.fail("client/object", "expired", times=100, key="AKIAOLD")
    file.write_text("[default]\naws_access_key_id = AKIANEW\naws_secret_access_key = new\n")
    assert client.cat_file(f"{client.root}/object", 0, 10) == DATA[:10]
    assert (client.counts["renewals"], client.counts["retries"]) == (1, 0)


def test_no_credentials(folder: str, settings: StorageConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    client = ObjectClient(folder, settings)
    with pytest.raises(StorageError, match=r"access is denied \(no credentials\)\. Check that this node"):
        client.cat_file(f"{client.root}/object", 0, 10)


def test_missing_and_shortened_objects_are_not_retried(store: ObjectStore, client: ObjectClient) -> None:
    with pytest.raises(ObjectMissing, match="s3://bucket/client/none does not exist"):
        client.cat_file(f"{client.root}/none", 0, 10)
    with pytest.raises(ObjectMissing, match="s3://bucket/client/object is shorter than stated"):
        client.cat_file(f"{client.root}/object", len(DATA) + 5, len(DATA) + 10)
    assert len(store.log("client/none")) == len(store.log("client/object")) == 1
    assert not client.exists(f"{client.root}/none") and client.exists(f"{client.root}/object")


def test_no_server(store: ObjectStore, settings: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    client = ObjectClient(f"s3://{BUCKET}/client", settings)
    with pytest.raises(StoreUnavailable, match="connection failed"):
        client.cat_file(f"{client.root}/object", 0, 10)


def test_long_ranges_are_several_requests(store: ObjectStore, client: ObjectClient) -> None:
    data = os.urandom(REQUEST_BYTES + 1000)
    client.pipe_file(f"{client.root}/long", data)
    store.fail()
    assert client.cat_file(f"{client.root}/long", 10, len(data)) == data[10:]
    assert store.log("client/long") == [
        f"bytes=10-{REQUEST_BYTES + 9}",
        f"bytes={REQUEST_BYTES + 10}-{len(data) - 1}",
    ]


def test_writing(store: ObjectStore, client: ObjectClient) -> None:
    store.fail("client/written", "slow_down", methods=["PUT"])
    with client.open(f"{client.root}/written", "wb") as file:
        file.write(DATA)
    with pytest.raises(RuntimeError, match="of the test"), client.open(f"{client.root}/broken", "wb") as file:
        file.write(DATA)
        raise RuntimeError("of the test")
    assert client.cat_file(f"{client.root}/written") == DATA
    client.mv(f"{client.root}/written", f"{client.root}/moved")
    names = {entry["name"].rpartition("/")[2] for entry in client.ls(client.root)}
    assert {"object", "moved"} <= names and not {"written", "broken"} & names
    assert client.sizes(["moved", "none"]) == {"moved": len(DATA)}


def test_addresses_with_credentials_are_refused() -> None:
    for address in (
        "https://me:secret@host/folder",
        "s3://key:secret@bucket/f",
        "https://host/f?X-Amz-Signature=secret",
    ):
        with pytest.raises(StorageError, match="holds credentials") as error:
            ObjectClient(address)
        assert "secret" not in str(error.value)


def test_packages_and_protocols_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="Protocol not known: s4"):
        ObjectClient("s4://bucket/folder")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match=r"need the package gcsfs, .* Run: pip install -e '\.\[gcs\]'"):
        ObjectClient("gs://bucket/folder")


def test_local_folders(tmp_path: Path) -> None:
    for address in (str(tmp_path), f"file://{tmp_path}"):
        fs, root = file_system(address)
        assert not isinstance(fs, ObjectClient) and root == str(tmp_path)


def test_pauses_double_and_differ(store: ObjectStore, client: ObjectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(data_section, "FIRST_PAUSE", 0.5)
    client.settings.attempts = 12
    store.fail("client/object", "slow_down", times=11)
    client.cat_file(f"{client.root}/object", 0, 10)
    longest = [min(30.0, 0.5 * 2**n) for n in range(11)]
    shares = [pause / limit for pause, limit in zip(pauses, longest, strict=True)]
    assert 0.5 <= min(shares) < max(shares) <= 1 and len(set(shares)) == 11
    assert client.settings.longest_wait == 12 * 20.0 + sum(longest)


class GoogleError(Exception):
    """As gcsfs raises them."""

    def __init__(self, code: int):
        super().__init__("text of the server")
        self.code = code


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        (401, FailureKind.ACCESS),
        (403, FailureKind.ACCESS),
        (404, FailureKind.MISSING),
        (429, FailureKind.PASSING),
        (502, FailureKind.PASSING),
    ],
)
def test_errors_of_google(status: int, fault: FailureKind) -> None:
    assert (examine(GoogleError(status)).fault, examine(GoogleError(status)).reason) == (fault, str(status))


def test_other_errors_are_final() -> None:
    assert examine(KeyError("x")).fault is FailureKind.FINAL


def test_exit_codes() -> None:
    """A restart may find the store available again; a mistake remains one. Both are one line."""
    for error, code in ((StoreUnavailable("s"), Exit.CRASH), (StorageError("s"), Exit.MISTAKE)):
        assert code_of(error) == code and is_users(error)


def test_public_buckets(folder: str, settings: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"{BUCKET}/client/public", DATA, ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # As FSSPEC_S3_ANON=true is read when fsspec is imported.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": "true"})
    client = ObjectClient(folder, settings)
    assert client.cat_file(f"{client.root}/public", 0, 10) == DATA[:10]


def test_connecting_is_not_logged(
    folder: str, settings: StorageConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the level INFO, which NeMo sets, with the filters of the command line."""
    for name in ("botocore.credentials", "aiobotocore.credentials", "botocore.configprovider"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    with caplog.at_level(logging.INFO):
        client = ObjectClient(folder, settings)
        client.cat_file(f"{client.root}/object", 0, 10)
        noisy = caplog.messages
        quiet_libraries()
        caplog.clear()
        client = ObjectClient(folder, settings)
        client.cat_file(f"{client.root}/object", 0, 10)
    assert noisy and not caplog.messages
