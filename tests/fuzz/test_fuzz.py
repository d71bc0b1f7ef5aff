"""A small sample of `make fuzz`, and tests of the fuzzer itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tars import tar_bytes

from fuzz import corpus, targets
from fuzz.__main__ import table
from fuzz.mutations import Damaged
from fuzz.targets import Case, Shards, Targets, outcome
from fuzz.workers import Result, run_cases

FEW = 240


def test_a_few_mutations_are_read_named_or_refused(tokenizer_folder: str, tmp_path: Path) -> None:
    made = Targets(tmp_path, tokenizer_folder, None)
    results = []
    for number in range(FEW):
        case = made.case(0, number)
        results.append(Result(0, number, case.label, outcome(case)))
    assert [result for result in results if result.failed] == []
    assert {result.kind for result in results} == {"read", "named", "refused"}
    assert f"| all | {FEW} |" in table(results)


def test_undamaged_files_are_read(tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "damage", lambda rng, data: Damaged(data, "nothing"))
    monkeypatch.setattr(targets, "damage_shard", lambda rng, members: Damaged(tar_bytes(members), "nothing"))
    made = Targets(tmp_path, tokenizer_folder, None)
    assert {outcome(made.case(0, number)) for number in range(60)} == {"read"}


def test_a_silently_lost_sample_is_reported(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = corpus.plain_members()
    shorter = tar_bytes(members[:10] + members[12:])
    monkeypatch.setattr(targets, "damage_shard", lambda rng, members: Damaged(shorter, "a sample is gone"))
    monkeypatch.setattr(corpus, "json_members", corpus.plain_members)
    monkeypatch.setattr(corpus, "conversation_members", corpus.plain_members)
    assert outcome(Shards(tmp_path, tokenizer_folder).case(random.Random(0))).startswith("silent: 0005 neither")


def test_a_traceback_is_reported() -> None:
    assert outcome(Case("x", lambda: str(1 // 0))).startswith("traceback: ZeroDivisionError")


def test_processes_run_cases_and_a_lost_one_is_replaced(tokenizer_folder: str, tmp_path: Path) -> None:
    results = run_cases([(0, n) for n in range(6)], tmp_path, tokenizer_folder, None, workers=1)
    first_results = [next(results) for _ in range(3)]
    assert not any(result.failed for result in first_results)
    assert [result.number for result in first_results] == [0, 1, 2]
    results.close()
