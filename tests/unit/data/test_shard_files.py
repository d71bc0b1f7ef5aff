"""Byte ranges of local shards: how many stay open, and that threads and forks may read at the same time."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import fork_server
import numpy as np
import pytest

from megatron_anymal.data.shard_files import ShardFiles

CONTENT = {f"{n}.tar": np.random.default_rng(n).bytes(5000) for n in range(8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def still_open(folder: Path) -> list[str]:
    """The files of the folder that this process has open."""
    numbers = os.listdir("/proc/self/fd")
    links = [os.readlink(f"/proc/self/fd/{n}") for n in numbers if os.path.lexists(f"/proc/self/fd/{n}")]
    return sorted(Path(link).name for link in links if link.startswith(str(folder)))


def test_ranges_are_those_of_the_file(folder: Path) -> None:
    files = ShardFiles(str(folder))
    for name, data in CONTENT.items():
        assert files.read(name, 100, 50) == data[100:150]
        assert files.read(name, 4990, 50) == data[4990:]
        assert files.read(name, 0, 0) == b"" == files.read(name, 9000, 5)
    with pytest.raises(OSError, match=r"9\.tar"):
        files.read("9.tar", 0, 1)


def test_the_shards_read_last_stay_open(folder: Path) -> None:
    files = ShardFiles(str(folder), most=3)
    for name in ("0.tar", "1.tar", "2.tar", "0.tar", "3.tar"):
        files.read(name, 0, 1)
    assert still_open(folder) == ["0.tar", "2.tar", "3.tar"]
    # The one that is open is read, even if its name is gone.
    (folder / "0.tar").unlink()
    assert files.read("0.tar", 0, 10) == CONTENT["0.tar"][:10]
    del files
    assert still_open(folder) == []


def test_threads_do_not_close_each_others_descriptors(folder: Path) -> None:
    files, wrong = ShardFiles(str(folder), most=1), []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, len(CONTENT), 300):
            name = f"{number}.tar"
            if files.read(name, 10 * seed, 400) != CONTENT[name][10 * seed : 10 * seed + 400]:
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(still_open(folder)) <= 1


def read_in_two_processes(folder: Path) -> None:
    """Parent and child read by turns; an offset that they shared would move under the other."""
    files = ShardFiles(str(folder))
    files.read("0.tar", 0, 1)
    to_child, to_parent = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        right = True
        for start in range(0, 5000, 500):
            os.read(to_child[0], 1)
            right &= files.read("0.tar", start, 500) == CONTENT["0.tar"][start : start + 500]
            os.write(to_parent[1], b"x")
        os._exit(0 if right else 1)
    for start in range(4500, -1, -500):
        os.write(to_child[1], b"x")
        assert files.read("0.tar", start, 500) == CONTENT["0.tar"][start : start + 500]
        os.read(to_parent[0], 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_reads_the_same_descriptors(folder: Path) -> None:
    process = fork_server.start(read_in_two_processes, folder)
    process.join(240)
    assert process.exitcode == 0


def test_the_limit_holds_for_all_folders_together(tmp_path: Path) -> None:
    """A run may have dozens of data sets."""
    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:
        folder.mkdir()
        for name, data in CONTENT.items():
            (folder / name).write_bytes(data)
    many = [ShardFiles(str(folder), most=12) for folder in folders]
    for name, data in CONTENT.items():
        assert all(files.read(name, 7, 9) == data[7:16] for files in many)
    assert sum(len(still_open(folder)) for folder in folders) == 12


def test_after_an_error_a_shard_is_opened_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, pread = ShardFiles(str(folder)), os.pread
    files.read("0.tar", 0, 1)

    def stale(*arguments: int) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(OSError, match="Stale"):
        files.read("0.tar", 0, 1)
    monkeypatch.setattr(os, "pread", pread)
    (folder / "new").write_bytes(b"new content")
    (folder / "new").replace(folder / "0.tar")
    assert files.read("0.tar", 0, 11) == b"new content"
