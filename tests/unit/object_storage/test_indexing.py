"""`anymal prepare --index-only` on an object store writes the index that it writes on the local disk."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_store import BUCKET, ObjectStore
from tars import write_tar
from tiny import png

from megatron_anymal.cli.prepare import main
from megatron_anymal.config import StorageConfig
from megatron_anymal.data.index_format import SHARDS
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.tar.reader import TarMember, TarWalk
from megatron_anymal.object_storage import client as client_module
from megatron_anymal.object_storage import sequential
from megatron_anymal.object_storage.client import ObjectClient
from megatron_anymal.object_storage.errors import StorageError, StoreUnavailable
from megatron_anymal.object_storage.sequential import SequentialBytes


@pytest.fixture
def address(store: ObjectStore, mixed_shards: str) -> str:
    """Shards with an older index."""
    address = store.upload(mixed_shards, "indexing")
    client = ObjectClient(address)
    client.pipe_file(f"{client.root}/index/index.json", b"{}")
    return address


def written(address: str) -> dict[str, bytes]:
    client = ObjectClient(address)
    entries = {entry["name"].rpartition("/")[2]: entry["name"] for entry in client.ls(f"{client.root}/index")}
    return {name: client.cat_file(path) for name, path in entries.items()}


def without_versions(shards: bytes) -> list[dict[str, Any]]:
    """The list of shards, without the version of each, which a store states as a hash and a disk as a time."""
    return [{**json.loads(line), "modified": ""} for line in shards.splitlines()]


def test_same_index(store: ObjectStore, address: str, mixed_shards: str, tokenizer_folder: str) -> None:
    store.fail(".tar", "slow_down", times=2)
    assert main(["--index-only", address, "--tokenizer", tokenizer_folder, "--workers", "1"]) == 0
    local = {path.name: path.read_bytes() for path in (Path(mixed_shards) / "index").iterdir()}
    stored = written(address)
    assert without_versions(stored.pop(SHARDS)) == without_versions(local.pop(SHARDS))
    assert stored == local


def test_same_index_from_parts(store: ObjectStore, mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    """In a folder without an index; some requests fail, and a part is started twice."""
    shards = shutil.copytree(mixed_shards, tmp_path / "shards", ignore=shutil.ignore_patterns("index"))
    address = store.upload(str(shards), "parts")
    command = ["--index-only", address, "--tokenizer", tokenizer_folder, "--workers", "1"]
    store.fail(".rows", "slow_down", times=2, methods=["PUT"])
    for part in ("2/2", "1/2"):
        assert main([*command, "--part", part]) == 0
    store.fail()
    assert main([*command, "--part", "1/2"]) == 0 and store.log(".tar") == []
    store.fail(".rows", "cut", times=2)
    assert main(["--merge", address]) == 0
    client = ObjectClient(address)
    assert not client.isdir(f"{client.root}/index/parts")
    joined = written(address)
    assert main([*command, "--rebuild"]) == 0
    assert written(address) == joined and len(ShardIndex(address)) == 40


def test_only_new_shards_are_read(store: ObjectStore, mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    address = store.upload(mixed_shards, "extended")
    command = ["--index-only", address, "--tokenizer", tokenizer_folder, "--workers", "1"]
    # The index of the local disk has other versions of the shards.
    assert main(command) == 0
    write_tar(tmp_path / "new" / "new.tar", [("n.png", png(1)), ("n.txt", b"one two")])
    store.upload(str(tmp_path / "new"), "extended")
    store.fail()
    assert main(command) == 0
    assert len(store.log("new.tar")) == len(store.log(".tar")) > 0 and len(ShardIndex(address)) == 41
    extended = written(address)
    assert main([*command, "--rebuild"]) == 0
    assert written(address) == extended


def test_store_that_fails_is_no_reason_to_read_every_shard(
    store: ObjectStore, mixed_shards: str, tokenizer_folder: str
) -> None:
    address = store.upload(mixed_shards, "unreadable-index")
    store.fail("index/index.json", "denied", times=100, methods=["HEAD", "GET"])
    with pytest.raises(StorageError, match="access is denied"):
        main(["--index-only", address, "--tokenizer", tokenizer_folder, "--workers", "1"])
    assert store.log(".tar") == []


def test_index_json_is_written_last(store: ObjectStore, address: str, tokenizer_folder: str) -> None:
    """A killed or failed indexing leaves no index.json beside arrays of another index."""
    store.fail("index/keys.bin", "denied", times=100, methods=["PUT"])
    with pytest.raises(StorageError, match=r"^s3://bucket/indexing/index/keys\.bin: access is denied"):
        main(["--index-only", address, "--tokenizer", tokenizer_folder, "--workers", "1"])
    assert "index.json" not in written(address)


def test_folders_that_cannot_be_written(store: ObjectStore, address: str, tokenizer_folder: str) -> None:
    """They are found before the shards are read."""
    store.fail("index/.writable", "denied", times=100, methods=["PUT"])
    with pytest.raises(StorageError, match="access is denied"):
        main(["--index-only", address, "--tokenizer", tokenizer_folder])
    assert store.log(".tar") == []
    for option, more in (("--index-only", ["--tokenizer", tokenizer_folder]), ("--merge", [])):
        with pytest.raises(DataError, match=rf"^{option} http://.*nothing can be written through an HTTP server"):
            main([option, f"{store.url}/files/indexing", *more])


def test_folders_without_shards(store: ObjectStore, address: str, tokenizer_folder: str) -> None:
    for folder in ("s3://bucket/nothing", "s3://none/nothing"):
        with pytest.raises(DataError, match="There is no shard folder 's3://"):
            main(["--index-only", folder, "--tokenizer", tokenizer_folder])
    client = ObjectClient("s3://bucket/compressed")
    client.pipe_file(f"{BUCKET}/compressed/a.tar.gz", b"x")
    with pytest.raises(DataError, match="compressed shard"):
        main(["--index-only", client.folder, "--tokenizer", tokenizer_folder])


def test_store_that_fails_leaves_no_shard_out(store: ObjectStore, address: str, tokenizer_folder: str) -> None:
    """A shard that cannot be read now is not an unreadable shard."""
    store.fail("0.tar", "slow_down", times=100)
    with pytest.raises(StoreUnavailable):
        main(["--index-only", address, "--tokenizer", tokenizer_folder, "--max-bad-share", "1", "--workers", "1"])


def test_shards_must_be_written_to_a_local_folder(tokenizer_folder: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"key": "a", "parts": [{"text": "one"}]}\n')
    arguments = ["--manifest", str(tmp_path / "manifest.jsonl"), "--out", "s3://bucket/out"]
    with pytest.raises(DataError, match=r"--out s3://bucket/out: shards are written to a local folder"):
        main([*arguments, "--tokenizer", tokenizer_folder])


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Requests of 4 KiB."""
    for module in (client_module, sequential):
        monkeypatch.setattr(module, "REQUEST_BYTES", 4096)
    yield 4096


def test_shards_are_read_once_and_ahead(
    store: ObjectStore, settings: StorageConfig, small_requests: int, tmp_path: Path
) -> None:
    archive, rng = io.BytesIO(), np.random.default_rng(0)
    contents = {f"{n:03d}.bin": rng.bytes(int(rng.integers(0, 20_000))) for n in range(20)}
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    client = ObjectClient(f"s3://{BUCKET}/sequential", settings)
    client.pipe_file(f"{client.root}/a.tar", archive.getvalue())
    store.fail("a.tar", "cut", times=2)
    source = SequentialBytes(client, f"{client.root}/a.tar")
    members = [entry for entry in TarWalk(source, 2**20) if isinstance(entry, TarMember)]
    assert {entry.name: source.read_at(entry.offset, entry.size) for entry in members} == contents
    requests = store.log("a.tar")
    chunks = -(-len(archive.getvalue()) // small_requests)
    # One pass over the headers, one over the data, each chunk once, and two that were cut.
    assert chunks <= len(requests) <= 2 * chunks + 2
    assert source.read_at(len(archive.getvalue()) - 5, 100) == archive.getvalue()[-5:]
    assert source.read_at(len(archive.getvalue()) + 5, 100) == b""
    assert len(source._chunks) <= 9
