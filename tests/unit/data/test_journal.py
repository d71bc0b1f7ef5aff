"""Journals: rows survive a kill, half rows do not, and two processes never write the same file."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_anymal.data.journal import Journal, read_journal
from megatron_anymal.data.records import DataError


def test_rows_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: journal.append({"n": n, "text": "ä\n" * n}), range(40)))
    assert sorted(row["n"] for row in read_journal(path)) == list(range(40))
    journal.close()
    assert sorted(row["n"] for row in Journal(path).rows) == list(range(40))


@pytest.mark.parametrize("tail", [b"{", b'{"n": 2}', b"\xff"])
def test_an_incomplete_last_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": 1}\n' + tail)
    assert read_journal(path) == [{"n": 0}, {"n": 1}]
    journal = Journal(path)
    journal.append({"n": 3})
    journal.close()
    assert read_journal(path) == journal.rows + [{"n": 3}] == [{"n": 0}, {"n": 1}, {"n": 3}]


def test_a_damaged_line_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content := b'{"n": 0}\n{"n"\n{"n": 2}\n')
    with pytest.raises(DataError, match=r"journal\.jsonl:2: not JSON"):
        Journal(path)
    assert path.read_bytes() == content


def test_one_process_writes(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(DataError, match="another process"):
        Journal(tmp_path / "journal.jsonl")
    first.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        first.append({"n": 0})
    Journal(tmp_path / "journal.jsonl").close()


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"n": 0})
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:20])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            journal.append({"n": 1, "text": "twenty or more bytes"})
    journal.append({"n": 2})
    assert read_journal(tmp_path / "journal.jsonl") == [{"n": 0}, {"n": 2}]
