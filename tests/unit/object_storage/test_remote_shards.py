"""Micro-batches read from an object store are, byte by byte, those read from the local disk."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import train
from object_store import BUCKET, ObjectStore
from ranks import run_ranks
from replicas import replica_data
from tiny import make_config

from megatron_anymal.config import RunConfig, StorageConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.object_storage.byte_ranges import ByteRange
from megatron_anymal.object_storage.client import ObjectClient
from megatron_anymal.object_storage.errors import StorageError, StoreUnavailable
from megatron_anymal.object_storage.member_reads import MemberReads
from megatron_anymal.train.build import DataSource


@pytest.fixture
def config(uploaded: str, tokenizer_folder: str, tmp_path: Path, settings: StorageConfig) -> RunConfig:
    config = make_config(uploaded, tokenizer_folder, tmp_path / "run")
    config.data.storage = settings
    return config


def read(data: DataSource, workers: int = 0, stop: int = 6) -> list[MicroBatch]:
    run = steps(data.planner, data.reader, replica=0, start=0, stop=stop, num_workers=workers, prefetch_steps=2)
    return [batch for _, batches in run for batch in batches]


def tensors(batches: list[MicroBatch]) -> list[torch.Tensor]:
    collected: list[torch.Tensor] = []
    for batch in batches:
        batch.with_tensors(lambda tensor: collected.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return collected


def assert_same(batches: list[MicroBatch], expected: list[MicroBatch]) -> None:
    assert [batch.bad for batch in batches] == [{}] * len(expected)
    ours, theirs = tensors(batches), tensors(expected)
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture
def expected(config: RunConfig, mixed_shards: str, tmp_path: Path) -> list[MicroBatch]:
    """The same micro-batches from the local disk."""
    config = make_config(mixed_shards, config.data.tokenizer, tmp_path / "local")
    return read(replica_data(config))


def client(data: DataSource) -> ObjectClient:
    [index] = data.planner.indexes
    assert index.remote is not None
    return index.remote.client


@pytest.mark.parametrize("cache_gib", [0.0, 0.01])
def test_same_micro_batches(
    store: ObjectStore, config: RunConfig, expected: list[MicroBatch], cache_gib: float
) -> None:
    config.data.storage.cache_gib, config.data.storage.cache_block_kib = cache_gib, 16
    data = replica_data(config)
    store.fail()
    counts = client(data).counts
    counts.clear()
    assert_same(read(data), expected)
    # Every byte was requested ahead, several members at a time, and nothing was held longer than needed.
    assert counts["requests"] == len(store.log(".tar")) < counts["reads"] / 2
    assert data.planner.indexes[0].remote.reads._requested == {} == data.reader._requested


def test_faults_while_reading(store: ObjectStore, config: RunConfig, expected: list[MicroBatch]) -> None:
    data = replica_data(config)
    for kind in ("slow_down", "cut", "short", "damaged"):
        store.fail(".tar", kind, times=2)
        counts = client(data).counts
        counts.clear()
        assert_same(read(data), expected)
        # Damage is only found by the index's checksum.
        assert counts["read_again" if kind == "damaged" else "retries"] >= 1


def read_beside_a_request(config: RunConfig, expected: RunConfig) -> None:
    """In a rank that has used the store and waits for an answer: a fork copies a connection without its thread."""
    data = replica_data(config)
    local = read(replica_data(expected))
    first = read(data, stop=2)
    assert_same(first, local[: len(first)])
    pending = client(data).submit(client(data).cat_file, f"{client(data).root}/index/index.json", 0, 10)
    assert_same(read(data, workers=2), local)
    assert len(pending.result(240)) == 10


def test_workers_connect_for_themselves(
    store: ObjectStore, config: RunConfig, mixed_shards: str, tmp_path: Path
) -> None:
    store.fail("index.json", "slow", seconds=2)
    local = make_config(mixed_shards, config.data.tokenizer, tmp_path / "local")
    # Ranks are killed at their time limit; a process whose workers hang could not end.
    run_ranks(1, read_beside_a_request, config, local)


def test_processes_of_a_node_read_each_block_once(
    store: ObjectStore, config: RunConfig, expected: list[MicroBatch]
) -> None:
    config.data.storage.cache_gib, config.data.storage.cache_block_kib = 0.01, 16
    data = replica_data(config)
    store.fail()
    assert_same(read(data, workers=3), expected)
    ranges = [span for name in data.planner.indexes[0].header.shards for span in bytes_of(store, name)]
    assert len(ranges) == len(set(ranges)) > 10
    # Another run on the node finds all of them.
    store.fail()
    assert_same(read(replica_data(config)), expected)
    assert store.log(".tar") == []


def bytes_of(store: ObjectStore, shard: str) -> list[tuple[str, int]]:
    """Numbers of the blocks of 16 KiB that were read."""
    spans = [span.removeprefix("bytes=").split("-") for span in store.log(shard)]
    return [(shard, number) for first, last in spans for number in range(int(first) // 2**14, int(last) // 2**14 + 1)]


def test_damaged_cache(store: ObjectStore, config: RunConfig, expected: list[MicroBatch]) -> None:
    config.data.storage.cache_gib = 0.01
    read(replica_data(config))
    blocks = [path for path in Path(config.data.storage.cache_folder, "blocks").rglob("*") if path.is_file()]
    for path in blocks:
        path.write_bytes(bytes(path.stat().st_size))
    data = replica_data(config)
    assert_same(read(data), expected)
    assert client(data).counts["read_again"] >= len(blocks) > 0
    assert not any(path.read_bytes().count(0) == path.stat().st_size for path in blocks)


def test_ranks_request_only_what_they_read(
    store: ObjectStore, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensor-parallel ranks share the media: each requests what it reads, and less than a rank alone."""
    requested: list[ByteRange] = []
    read_ranges: list[ByteRange] = []
    request, read_one = MemberReads.request, MemberReads.read

    def noted_request(self: MemberReads, ranges: Iterable[ByteRange]) -> None:
        ranges = list(ranges)
        requested.extend(ranges)
        request(self, ranges)

    def noted_read(self: MemberReads, wanted: ByteRange) -> bytes:
        read_ranges.append(wanted)
        return read_one(self, wanted)

    monkeypatch.setattr(MemberReads, "request", noted_request)
    monkeypatch.setattr(MemberReads, "read", noted_read)
    counts = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        requested.clear()
        read_ranges.clear()
        read(replica_data(config, tensor_rank=rank, tensor_size=size), stop=3)
        assert Counter(requested) == Counter(read_ranges)
        counts.append(len(read_ranges))
    assert max(counts[1:]) < counts[0]


def test_store_that_fails_ends_the_run(store: ObjectStore, config: RunConfig) -> None:
    """It is not a sample's fault: nothing is skipped, and the error is one line."""
    data = replica_data(config)
    for kind, workers, error in (("slow_down", 1, StoreUnavailable), ("denied", 0, StorageError)):
        store.fail(".tar", kind, times=1000)
        with pytest.raises(error, match=rf"^s3://{BUCKET}/mixed/[^\n]*\.tar: [^\n]*$"):
            read(data, workers)


def test_missing_and_changed_shards(store: ObjectStore, config: RunConfig, mixed_shards: str) -> None:
    """A shard that disappears during a run makes its samples unreadable, as on a local disk."""
    address = store.upload(mixed_shards, "changing")
    config.data.train["mix"].path = address
    data = replica_data(config)
    client(data).rm_file(f"{BUCKET}/changing/{data.planner.indexes[0].header.shards[0]}")
    bad = [why for batch in read(data) for why in batch.bad.values()]
    assert bad and all("does not exist" in why for why in bad)
    with pytest.raises(DataError, match="is missing"):
        replica_data(config)
    client(data).pipe_file(f"{BUCKET}/changing/{data.planner.indexes[0].header.shards[0]}", b"short")
    with pytest.raises(DataError, match="has 5 bytes, but the index states"):
        replica_data(config)


def test_http_server(store: ObjectStore, config: RunConfig, expected: list[MicroBatch], mixed_shards: str) -> None:
    (store.files / "http").symlink_to(mixed_shards)
    config.data.train["mix"].path = f"{store.url}/files/http"
    data = replica_data(config)
    store.fail(".tar", "cut", times=2)
    assert_same(read(data, workers=1), expected)
    config.data.train["mix"].path = f"{store.url}/plain/http"
    with pytest.raises(StorageError, match="the server ignores byte ranges"):
        read(replica_data(config))


def test_without_read_ahead(store: ObjectStore, config: RunConfig, expected: list[MicroBatch]) -> None:
    config.data.storage.read_ahead = 0
    assert_same(read(replica_data(config)), expected)


def run(config: RunConfig) -> dict[str, Any]:
    return train(config)


def test_same_losses(store: ObjectStore, config: RunConfig, mixed_shards: str, tmp_path: Path) -> None:
    local = make_config(mixed_shards, config.data.tokenizer, tmp_path / "local")
    for one in (config, local):
        one.trainer.max_steps, one.data.num_workers = 3, 2
    store.fail(".tar", "slow_down", times=2)
    [remote_result], [local_result] = run_ranks(1, run, config), run_ranks(1, run, local)
    assert remote_result["losses"] == local_result["losses"] and len(remote_result["losses"]) == 3
    for name, weight in remote_result["weights"].items():
        assert np.array_equal(weight, local_result["weights"][name]), name


def test_index_is_mapped_from_one_copy(store: ObjectStore, uploaded: str, settings: StorageConfig) -> None:
    store.fail()
    indexes = [ShardIndex(uploaded, storage=settings) for _ in range(2)]
    assert len(store.log("samples.npy")) == 1
    for index in indexes:
        assert isinstance(index.samples, np.memmap) and isinstance(index.media, np.memmap)
    [copy] = Path(settings.cache_folder, "indexes").iterdir()
    assert Path(indexes[0].samples.filename).is_relative_to(copy)


def test_shards_of_other_checksums_are_named(store: ObjectStore, uploaded: str, settings: StorageConfig) -> None:
    index = ShardIndex(uploaded, storage=settings)
    store.fail(".tar", "damaged", times=2)
    row = index.samples[0]
    assert zlib.crc32(b"") != int(row["text_crc"])
    with pytest.raises(
        DataError, match=r"sample .* of 's3://bucket/mixed': its bytes in s3://bucket/mixed/.*\.tar differ"
    ):
        index.sample(0)
    assert index.sample(0).documents
