"""Reads of a local file return its bytes in any order, and small ones that follow each other share a system call."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from megatron_anymal.data.tar import byte_source
from megatron_anymal.data.tar.byte_source import LocalBytes


@pytest.fixture
def preads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the reads."""
    lengths: list[int] = []
    pread = os.pread

    def noting(descriptor: int, length: int, offset: int) -> bytes:
        lengths.append(length)
        # The system may return less than requested.
        return pread(descriptor, min(length, 100_000), offset)

    monkeypatch.setattr(byte_source.os, "pread", noting)
    return lengths


def test_any_order(tmp_path: Path, preads: list[int]) -> None:
    rng = random.Random(0)
    content = rng.randbytes(1_500_000)
    (tmp_path / "f").write_bytes(content)
    with (tmp_path / "f").open("rb") as file:
        source, offset = LocalBytes(file.fileno()), 0
        assert source.size == len(content)
        for _ in range(3000):
            jump = rng.choice([0, 0, 0, 512, 5000, -3000, 70_000, rng.randrange(-(10**6), 10**6)])
            offset = min(max(0, offset + jump), len(content) + 10)
            length = rng.choice([0, 1, 512, 512, 3000, 65_536, 65_537, 300_000])
            assert source.read_at(offset, length) == content[offset : offset + length]
            offset += length


def test_small_reads_are_joined(tmp_path: Path, preads: list[int]) -> None:
    (tmp_path / "f").write_bytes(bytes(2**20))
    with (tmp_path / "f").open("rb") as file:
        source = LocalBytes(file.fileno())
        for offset in range(0, 2**20, 512):
            source.read_at(offset, 512)
        assert len(preads) <= 20
        # Headers between large members do not read these.
        preads.clear()
        for offset in range(0, 2**20, 200_000):
            source.read_at(offset, 512)
        assert sum(preads) <= 2 * 2**18 + 6 * 512
