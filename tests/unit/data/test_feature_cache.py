"""The feature cache: keys, damage, its limit, and processes that share it or are killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, start_ranks

from megatron_anymal.data.feature_cache import FeatureCache, PieceKey, item_digest
from megatron_anymal.data.records import MediaPart
from megatron_anymal.data.shard_index import MediaBytes
from megatron_anymal.object_storage.cache_folder import cache_folder

SHAPE = (4, 8)
KEY = PieceKey("a" * 64, 3, 1)


def opened(
    folder: Path, identity: str = "encoder", entries: int = 100, dtype: torch.dtype = torch.bfloat16
) -> FeatureCache:
    return FeatureCache(cache_folder(str(folder)), entries * (32 * dtype.itemsize + 4), identity, SHAPE, dtype)


def features(number: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).to(dtype)


def read(cache: FeatureCache, key: PieceKey) -> torch.Tensor | None:
    out = torch.zeros(SHAPE, dtype=cache.dtype)
    return out if cache.read(key, out) else None


def files(folder: Path) -> list[Path]:
    # Unlike rglob, os.walk skips a folder that a writer has just renamed.
    return sorted(Path(parent) / name for parent, _, names in os.walk(folder / "blocks") for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = opened(tmp_path, dtype=dtype)
    assert read(cache, KEY) is None and not cache.holds(KEY)
    cache.add(KEY, features(0, dtype))
    assert torch.equal(read(cache, KEY), features(0, dtype)) and cache.holds(KEY)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"item": "b" * 64}, {"pieces": 4}, {"number": 2}])
def test_another_piece_is_another_entry(tmp_path: Path, change: dict[str, object]) -> None:
    cache = opened(tmp_path)
    cache.add(KEY, features(0))
    assert read(cache, dataclasses.replace(KEY, **change)) is None  # type: ignore[arg-type]


def test_another_encoder_is_another_entry(tmp_path: Path) -> None:
    opened(tmp_path).add(KEY, features(0))
    assert read(opened(tmp_path, "other"), KEY) is None
    assert read(opened(tmp_path, dtype=torch.float16), KEY) is None


def test_digest_covers_content_and_how_it_is_read() -> None:
    part = MediaPart("walk.npy", "imu", {"rate": 50})
    media = MediaBytes(part, b"content", "npy")
    others = [
        dataclasses.replace(media, data=b"contents"),
        dataclasses.replace(media, extension="csv"),
        dataclasses.replace(media, part=dataclasses.replace(part, attributes={"rate": 100})),
    ]
    assert len({item_digest(one) for one in (media, *others)}) == 4
    # Another name of the same file.
    assert item_digest(dataclasses.replace(media, part=dataclasses.replace(part, media="run.npy"))) == item_digest(
        media
    )


@pytest.mark.parametrize("at", [0, 30, 63, 64, 67])
def test_a_damaged_entry_is_removed_and_made_again(tmp_path: Path, at: int) -> None:
    cache = opened(tmp_path)
    cache.add(KEY, features(0))
    [file] = files(tmp_path)
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    assert read(cache, KEY) is None and not cache.holds(KEY)
    cache.add(KEY, features(0))
    assert torch.equal(read(cache, KEY), features(0))  # type: ignore[arg-type]


def test_an_entry_under_the_name_of_another_is_damaged(tmp_path: Path) -> None:
    cache, other = opened(tmp_path), dataclasses.replace(KEY, number=2)
    cache.add(KEY, features(0))
    [file] = files(tmp_path)
    file.rename(file.with_name("2"))
    assert cache.holds(other) and read(cache, other) is None and not cache.holds(other)


def test_least_recently_used_features_are_removed(tmp_path: Path) -> None:
    cache = opened(tmp_path, entries=10)
    keys = [PieceKey(f"{n:064}", 1, 0) for n in range(12)]
    for n in range(10):
        cache.add(keys[n], features(n))
    assert read(cache, keys[0]) is not None
    cache.add(keys[10], features(10))
    assert [n for n in range(12) if cache.holds(keys[n])] == [0, *range(3, 11)]
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 10 * cache.entry_bytes


def use(folder: Path) -> tuple[int, int]:
    """In one of several processes: read what is there, add what is not; returns hits and wrong features."""
    cache, hits, wrong = opened(folder), 0, 0
    for n in range(300):
        # Each process begins at a different one of 150 keys, more than there is room for.
        number = (n + 40 * int(os.environ["RANK"])) % 150
        key = PieceKey(f"{number:064}", 1, 0)
        cached_features = read(cache, key)
        if cached_features is None:
            cache.add(key, features(number))
        else:
            hits, wrong = hits + 1, wrong + int(not torch.equal(cached_features, features(number)))
    return hits, wrong


def test_processes_share_a_cache(tmp_path: Path) -> None:
    results = run_ranks(4, use, tmp_path)
    assert all(wrong == 0 for _, wrong in results) and sum(hits for hits, _ in results) > 100
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 100 * opened(tmp_path).entry_bytes


def write_forever(folder: Path) -> None:
    cache, n = opened(folder), 0
    while True:
        number = n % 150
        cache.add(PieceKey(f"{number:064}", 1, 0), features(number))
        n += 1


def test_a_killed_writer_leaves_nothing_broken(tmp_path: Path) -> None:
    for folder in (tmp_path / name for name in "abc"):
        processes, _ = start_ranks(2, write_forever, (folder,))
        deadline = time.monotonic() + 240
        while not (folder / "blocks").exists() or not files(folder):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join(240)
        cache = opened(folder)
        known = {number: read(cache, PieceKey(f"{number:064}", 1, 0)) for number in range(150)}
        cached_features = {number: one for number, one in known.items() if one is not None}
        assert len(cached_features) == len(files(folder)) > 0
        assert all(torch.equal(one, features(number)) for number, one in cached_features.items())
        # Locks of killed processes are free.
        cache.add(KEY, features(0))
        assert read(cache, KEY) is not None
