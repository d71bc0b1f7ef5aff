"""The local copy of an index: made once per node, replaced when the index changes, and never half a copy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from object_store import BUCKET, ObjectStore
from ranks import run_ranks

from megatron_anymal.config import StorageConfig
from megatron_anymal.data.index_format import BOUNDS, SHARDS
from megatron_anymal.data.packing_journal import JOURNAL
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.object_storage import index_copy
from megatron_anymal.object_storage.errors import StorageError, StoreUnavailable

ARRAYS = ("samples.npy", "media.npy", "keys.bin")


@pytest.fixture
def address(store: ObjectStore, mixed_shards: str) -> str:
    """A folder whose index a test may change."""
    return store.upload(mixed_shards, "index-copy")


def copies(settings: StorageConfig) -> list[Path]:
    return sorted(Path(settings.cache_folder, "indexes").iterdir())


def rewrite(name: str, data: bytes) -> None:
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"{BUCKET}/index-copy/index/{name}", data)


def open_it(address: str, settings: StorageConfig) -> int:
    """In a process of its own: number of samples."""
    return len(ShardIndex(address, storage=settings))


def test_copied_once_for_all_processes(store: ObjectStore, address: str, settings: StorageConfig) -> None:
    store.fail("samples.npy", "slow", seconds=0.5)
    assert run_ranks(3, open_it, address, settings) == [40, 40, 40]
    for name in ARRAYS:
        assert len(store.log(f"index/{name}")) == 1
    assert len(copies(settings)) == 1


def test_changed_index_is_noticed(
    address: str, settings: StorageConfig, mixed_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ShardIndex(address, storage=settings)
    keys = (Path(mixed_shards) / "index" / "keys.bin").read_bytes()
    # The same size: only the store's version differs.
    rewrite("keys.bin", keys.replace(b"image", b"IMAGE"))
    second = ShardIndex(address, storage=settings)
    assert first.key(0).startswith("image") and second.key(0).startswith("IMAGE")
    assert len(copies(settings)) == 2
    # The older copy may be in use; it goes when it has not been used for a day.
    monkeypatch.setattr(index_copy, "_UNUSED", -1.0)
    ShardIndex(address, storage=settings)
    assert len(copies(settings)) == 1
    assert first.key(1) == ShardIndex(mixed_shards).key(1)


def test_damaged_copy_is_replaced(store: ObjectStore, address: str, settings: StorageConfig) -> None:
    ShardIndex(address, storage=settings)
    [copy] = copies(settings)
    with (copy / "index" / "samples.npy").open("r+b") as file:
        file.truncate(100)
    store.fail()
    assert len(ShardIndex(address, storage=settings)) == 40 and len(store.log("samples.npy")) == 1


def test_no_half_copy(store: ObjectStore, address: str, settings: StorageConfig) -> None:
    store.fail("media.npy", "slow_down", times=100)
    with pytest.raises(StoreUnavailable, match=r"index-copy/index/media\.npy"):
        ShardIndex(address, storage=settings)
    assert copies(settings) == [] == list(Path(settings.cache_folder, "partial").iterdir())
    # What a killed process left does not disturb the next one.
    store.fail()
    assert len(ShardIndex(address, storage=settings)) == 40
    [copy] = copies(settings)
    shutil.rmtree(copy / "index")
    (Path(settings.cache_folder) / "partial" / copy.name / "index").mkdir(parents=True)
    assert len(ShardIndex(address, storage=settings)) == 40


def test_index_that_changes_while_it_is_copied(
    address: str, settings: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = index_copy._download

    def download_and_change(client: object, path: str, *rest: object) -> None:
        download(client, path, *rest)  # type: ignore[arg-type]
        if path.endswith("media.npy"):
            fsspec.filesystem("s3").rm_file(f"{BUCKET}/index-copy/index/index.json")

    monkeypatch.setattr(index_copy, "_download", download_and_change)
    with pytest.raises(StorageError, match=r"s3://bucket/index-copy: the index changed while it was copied\. Start"):
        ShardIndex(address, storage=settings)
    assert copies(settings) == []


def test_missing_index(store: ObjectStore, address: str, settings: StorageConfig) -> None:
    fsspec.filesystem("s3", skip_instance_cache=True).rm_file(f"{BUCKET}/index-copy/index/index.json")
    with pytest.raises(
        DataError, match=r"'s3://bucket/index-copy' has no index .* `anymal prepare --index-only s3://b"
    ):
        ShardIndex(address, storage=settings)
    with pytest.raises(DataError, match=r"'s3://none/folder' has no index .*404"):
        ShardIndex("s3://none/folder", storage=settings)


def test_all_files_that_training_reads_are_copied(address: str, settings: StorageConfig, mixed_shards: str) -> None:
    index, local = ShardIndex(address, storage=settings), ShardIndex(mixed_shards)
    [copy] = copies(settings)
    files = (path for path in (Path(mixed_shards) / "index").iterdir() if path.name != JOURNAL)
    sources = {path.name: path.read_bytes() for path in files}
    assert {path.name: path.read_bytes() for path in (copy / "index").iterdir()} == sources
    assert {BOUNDS, SHARDS} < set(sources) and index.bounds is not None and local.bounds is not None
    assert (index.bounds.table == local.bounds.table).all() and index.read_file(SHARDS) == local.read_file(SHARDS)


def test_indexes_of_earlier_versions(address: str, settings: StorageConfig, mixed_shards: str) -> None:
    """They have neither bounds nor a list of shards, and their index.json has no counts."""
    body = json.loads((Path(mixed_shards) / "index" / "index.json").read_text())
    rewrite("index.json", json.dumps({k: v for k, v in body.items() if k not in ("counts", "options")}).encode())
    for name in (BOUNDS, SHARDS):
        fsspec.filesystem("s3", skip_instance_cache=True).rm_file(f"{BUCKET}/index-copy/index/{name}")
    index = ShardIndex(address, storage=settings)
    assert index.bounds is None and len(index) == 40
    assert index.sample_kinds() == ShardIndex(mixed_shards).sample_kinds()


def test_lost_bounds(address: str, settings: StorageConfig) -> None:
    """An index whose index.json has counts is incomplete without its bounds."""
    fsspec.filesystem("s3", skip_instance_cache=True).rm_file(f"{BUCKET}/index-copy/index/{BOUNDS}")
    with pytest.raises(DataError, match="is incomplete"):
        _ = ShardIndex(address, storage=settings).bounds


def test_ledger(address: str, settings: StorageConfig) -> None:
    rewrite("left_out.jsonl", b'{"shard": "a.tar", "code": "torn", "reason": "why"}\n')
    [entry] = ShardIndex(address, storage=settings).left_out()
    assert entry.reason == "why"


def test_full_disk(address: str, settings: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"The index of s3://bucket/index-copy cannot be copied to .*No space left"):
        ShardIndex(address, storage=settings)
