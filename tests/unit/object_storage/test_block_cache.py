"""The cache of blocks: its size limit, the order of removal, and what processes that share it or die leave behind."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_anymal.config import StorageConfig
from megatron_anymal.object_storage.block_cache import BlockCache, CachedObject
from megatron_anymal.object_storage.byte_ranges import ByteRange, coalesce, runs
from megatron_anymal.object_storage.cache_folder import cache_folder
from megatron_anymal.object_storage.errors import StorageError
from megatron_anymal.object_storage.file_locks import locked

BLOCK = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return cache_folder(str(tmp_path / "cache"))


@pytest.fixture
def cache(folder: Path) -> BlockCache:
    """Room for ten blocks."""
    return BlockCache(folder, 10 * BLOCK, BLOCK)


def content(number: int) -> bytes:
    return bytes([number % 256]) * BLOCK


def kept(cache: BlockCache, entry: CachedObject) -> list[int]:
    """Blocks in the cache; asking for them is a use of them."""
    numbers = range(entry.size // BLOCK)
    return [n for n in numbers if cache.read(entry, n, n * BLOCK, (n + 1) * BLOCK) == content(n)]


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "blocks").rglob("*") if path.is_file())


def test_parts_of_blocks(cache: BlockCache) -> None:
    entry = cache.object("s3://bucket/a.tar", 2500)
    data = bytes(i % 251 for i in range(2500))
    assert cache.read(entry, 2, 2000, 2500) is None
    for number in range(3):
        cache.put(entry, number, data[number * BLOCK : (number + 1) * BLOCK])
    assert cache.read(entry, 1, 1100, 1900) == data[1100:1900]
    assert cache.read(entry, 2, 2000, 2500) == data[2000:]
    # Another size is another object: the shard was replaced.
    assert cache.read(cache.object("s3://bucket/a.tar", 2501), 1, 1100, 1900) is None


def test_least_recently_used_blocks_are_removed(cache: BlockCache, folder: Path) -> None:
    entry = cache.object("s3://bucket/a.tar", 100 * BLOCK)
    for number in range(10):
        cache.put(entry, number, content(number))
    assert on_disk(folder) == 10 * BLOCK
    assert cache.read(entry, 0, 0, BLOCK) is not None
    cache.put(entry, 10, content(10))
    # Room for a tenth of the limit and the new block, taken from the oldest: 1 and 2, not 0, which was read.
    assert kept(cache, entry) == [0, *range(3, 11)]


def test_limit_holds_at_all_times(cache: BlockCache, folder: Path) -> None:
    entry = cache.object("s3://bucket/a.tar", 1000 * BLOCK)
    for number in range(100):
        cache.put(entry, number, content(number))
        assert on_disk(folder) <= 10 * BLOCK
        assert number in kept(cache, entry)
    cache.put(entry, 200, bytes(11 * BLOCK))
    assert cache.read(entry, 200, 200 * BLOCK, 201 * BLOCK) is None


def fill(folder: Path) -> None:
    """In one of several processes: add more blocks than there is room for."""
    cache = BlockCache(folder, 10 * BLOCK, BLOCK)
    entry = cache.object(f"s3://bucket/{os.environ['RANK']}.tar", 1000 * BLOCK)
    for number in range(50):
        cache.put(entry, number, content(number))
        # Nothing changes under this lock.
        with locked(folder / "usage"):
            assert on_disk(folder) <= 10 * BLOCK


def test_processes_share_one_limit(folder: Path) -> None:
    run_ranks(4, fill, folder)
    assert 5 * BLOCK <= on_disk(folder) == int((folder / "usage").read_text())


def test_damage_and_leftovers_are_not_read(cache: BlockCache, folder: Path) -> None:
    entry = cache.object("s3://bucket/a.tar", 10 * BLOCK)
    cache.put(entry, 0, content(0))
    (entry.folder / "0").write_bytes(content(0)[:-1])
    assert cache.read(entry, 0, 0, 10) is None
    # Left by a process that was killed while it wrote.
    partial = folder / "partial" / "left"
    partial.write_bytes(content(1)[:500])
    os.utime(partial, (0, 0))
    for number in range(12):
        cache.put(entry, number % 10, content(number % 10))
    assert not partial.exists() and list((folder / "partial").iterdir()) == []


def test_emptied_folder(cache: BlockCache, folder: Path) -> None:
    """Those who clean up temporary files may remove anything at any time."""
    entry = cache.object("s3://bucket/a.tar", 10 * BLOCK)
    cache.put(entry, 0, content(0))
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with cache.locked(entry, [0]):
        cache.put(entry, 0, content(0))
    assert kept(cache, entry) == [0] and int((folder / "usage").read_text()) == BLOCK


def test_full_disk_leaves_blocks_out(cache: BlockCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    entry = cache.object("s3://bucket/a.tar", 10 * BLOCK)
    cache.put(entry, 0, content(0))
    assert kept(cache, entry) == [] and list((folder / "partial").iterdir()) == []


def test_disk_that_fails(cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = cache.object("s3://bucket/a.tar", 10 * BLOCK)
    cache.put(entry, 0, content(0))

    def broken(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    assert cache.read(entry, 0, 0, 10) is None


def test_locks_exclude_threads_and_end_with_their_process(cache: BlockCache) -> None:
    entry = cache.object("s3://bucket/a.tar", 10 * BLOCK)
    order = []

    def wait() -> None:
        with cache.locked(entry, [1, 2]):
            order.append("thread")

    with cache.locked(entry, [2, 3]):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.05)
        order.append("holder")
    thread.join(240)
    assert order == ["holder", "thread"]


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    default = cache_folder("")
    assert default == tmp_path / f"anymal-cache-{os.getuid()}" and default.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    (tmp_path / "anymal-cache-4321").mkdir()
    with pytest.raises(StorageError, match=r"belongs to another user\. Set data\.storage\.cache_folder"):
        cache_folder("")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"The cache cannot be created in .*file/cache"):
        cache_folder(StorageConfig(cache_folder=str(tmp_path / "file" / "cache")).cache_folder)


def test_ranges_are_joined_across_small_gaps() -> None:
    near, far, other = ByteRange("a", 20, 30), ByteRange("a", 41, 50), ByteRange("b", 0, 5)
    first = ByteRange("a", 0, 10)
    assert coalesce([other, far, first, near, first], gap=10) == [
        (ByteRange("a", 0, 30), [first, near]),
        (far, [far]),
        (other, [other]),
    ]
    inside = ByteRange("a", 2, 4)
    assert coalesce([first, inside], gap=0) == [(first, [first, inside])]
    assert runs([1, 2, 3, 7, 9, 10]) == [range(1, 4), range(7, 8), range(9, 11)]
