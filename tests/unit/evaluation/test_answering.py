"""Answers on disk: cut-off lines, several copies, other settings; and batches of similar lengths."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_anymal.data.records import DataError
from megatron_anymal.evaluation.answering import batches_of
from megatron_anymal.evaluation.journal import AnswerJournal, AnswerRow
from megatron_anymal.evaluation.samples import TaskSample


def test_lines_that_were_cut_off(tmp_path: Path) -> None:
    journal, rows = (
        AnswerJournal(tmp_path / "task"),
        [AnswerRow(str(n), f"text\n{n} \u2028", (0.5, -n)) for n in range(4)],
    )
    journal.append(0, rows[:2])
    journal.close()
    path = tmp_path / "task" / "answers.0.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = journal.read()
        assert len(kept) == whole[:length].count(b"\n")
        journal.append(0, rows[2:3])
        journal.close()
        assert list(journal.read()) == [*kept, "2"]
    journal.append(1, rows[1:])
    assert journal.read() == {row.key: row for row in rows}


def test_other_settings(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    journal.check_settings({"model": "a"}, write=False)
    assert not list(tmp_path.iterdir())
    journal.check_settings({"model": "a"}, write=True)
    journal.check_settings({"model": "a"}, write=True)
    with pytest.raises(DataError, match="holds answers with model='a', not 'b'"):
        journal.check_settings({"model": "b"}, write=True)


@pytest.mark.parametrize(("count", "size", "copies"), [(17, 4, 1), (17, 4, 3), (3, 64, 2), (1, 8, 4)])
def test_batches_share_all_samples(count: int, size: int, copies: int) -> None:
    samples = [TaskSample(n, str(n), "vqa", {"question": "x" * (7 * n % 5)}, (), ()) for n in range(count)]
    shares = [batches_of(samples, size, copy, copies) for copy in range(copies)]
    batches = [batch for share in shares for batch in share]
    assert sorted(s.number for batch in batches for s in batch) == list(range(count))
    assert max(map(len, batches)) <= size
    # Each share is from long to short, and no copy has two batches more than another.
    for share in shares:
        lengths = [sample.size for batch in share for sample in batch]
        assert lengths == sorted(lengths, reverse=True)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
