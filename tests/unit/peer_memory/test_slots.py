"""Slots of a rank's copies: complete or invalid, and never both overwritten."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from megatron_anymal.peer_memory.slots import Copy, SlotFile


def make(path: Path, size: int = 100) -> SlotFile:
    path.touch()
    return SlotFile(str(path), size)


def write(file: SlotFile, step: int) -> int:
    slot = file.begin()
    data = bytes([step]) * file.size
    file.data(slot)[:] = data
    file.commit(slot, Copy(3, step, "run", file.size, zlib.crc32(data), (step, step)))
    return slot


def steps(path: Path) -> list[int]:
    return sorted(copy.step for copy in SlotFile(str(path)).copies().values())


def test_the_two_newest_steps_are_kept(tmp_path: Path) -> None:
    file = make(tmp_path / "file")
    assert steps(tmp_path / "file") == []
    for step in (1, 2, 3):
        write(file, step)
    reader = SlotFile(str(tmp_path / "file"))
    contents = {copy.step: bytes(reader.data(slot)) for slot, copy in reader.copies().items()}
    assert contents == {2: bytes([2]) * 100, 3: bytes([3]) * 100}
    assert {copy.counts for copy in reader.copies().values()} == {(2, 2), (3, 3)}


def test_a_rank_killed_while_copying_leaves_the_newest_complete_step(tmp_path: Path) -> None:
    file = make(tmp_path / "file")
    for step in (1, 2):
        write(file, step)
    slot = file.begin()
    file.data(slot)[:50] = bytes(50)
    assert steps(tmp_path / "file") == [2]
    # The next rank overwrites what was left half written.
    write(make(tmp_path / "file"), 3)
    assert steps(tmp_path / "file") == [2, 3]


@pytest.mark.parametrize("at", range(0, 60, 7))
def test_a_torn_header_is_no_copy(tmp_path: Path, at: int) -> None:
    slot = write(make(tmp_path / "file"), 1)
    with (tmp_path / "file").open("r+b") as file:
        file.seek(slot * 4096 + at)
        byte = file.read(1)[0]
        file.seek(slot * 4096 + at)
        file.write(bytes([byte ^ 1]))
    assert steps(tmp_path / "file") == []


def test_another_size_drops_the_contents(tmp_path: Path) -> None:
    write(make(tmp_path / "file"), 1)
    make(tmp_path / "file", 100)
    assert steps(tmp_path / "file") == [1]
    make(tmp_path / "file", 200)
    assert steps(tmp_path / "file") == []


def test_cleared_slots_are_empty(tmp_path: Path) -> None:
    file = make(tmp_path / "file")
    for step in (1, 2):
        write(file, step)
    file.clear()
    assert steps(tmp_path / "file") == []
