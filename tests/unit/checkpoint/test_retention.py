"""Which checkpoints are kept, and that an interrupted deletion does no harm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_anymal.checkpoint.retention import retain
from megatron_anymal.checkpoint.store import (
    MANIFEST,
    Manifest,
    clean,
    commit,
    committed,
    committed_folder,
    newest_valid,
    staging_folder,
    step_of,
)
from megatron_anymal.config import CheckpointConfig


def write(checkpoints: Path, step: int, **metrics: float) -> Path:
    """Write a checkpoint with its step's validation metrics."""
    staging, final = staging_folder(checkpoints, step), committed_folder(checkpoints, step)
    staging.mkdir(parents=True)
    (staging / "a.distcp").write_bytes(str(step).encode())
    commit(staging, final, Manifest(step, step, {}, {}, "", "", {}, metrics=metrics))
    return final


def steps(checkpoints: Path) -> list[int]:
    return [step_of(folder) for folder in reversed(committed(checkpoints))]


def save_all(checkpoints: Path, rules: CheckpointConfig, losses: dict[int, float]) -> list[list[int]]:
    """Steps on disk after each of several saves."""
    seen = []
    for step, loss in losses.items():
        write(checkpoints, step, val_loss=loss)
        retain(checkpoints, rules, step)
        seen.append(steps(checkpoints))
    return seen


# Step -> validation loss.
LOSSES = {10: 5.0, 20: 3.0, 30: 4.0, 40: 2.0, 50: 6.0, 60: 2.0, 70: 7.0}
RULES = [
    (CheckpointConfig(keep_last=0), [10, 20, 30, 40, 50, 60, 70]),
    (CheckpointConfig(keep_last=1), [70]),
    (CheckpointConfig(keep_last=2), [60, 70]),
    (CheckpointConfig(keep_last=2, keep_every_n_steps=30), [30, 60, 70]),
    # Steps 40 and 60 tie for the best loss: the later one wins.
    (CheckpointConfig(keep_last=1, keep_best=1), [60, 70]),
    (CheckpointConfig(keep_last=1, keep_best=3), [20, 40, 60, 70]),
    (CheckpointConfig(keep_last=1, keep_best=2, keep_best_mode="max"), [50, 70]),
    (CheckpointConfig(keep_last=1, keep_best=2, keep_best_metric="val_loss/none"), [70]),
    (CheckpointConfig(keep_last=1, keep_every_n_steps=20, keep_best=1), [20, 40, 60, 70]),
]


@pytest.mark.parametrize(("rules", "left"), RULES)
def test_rules(tmp_path: Path, rules: CheckpointConfig, left: list[int]) -> None:
    assert save_all(tmp_path, rules, LOSSES)[-1] == left


def test_the_best_are_the_best_so_far(tmp_path: Path) -> None:
    rules = CheckpointConfig(keep_last=1, keep_best=1)
    assert save_all(tmp_path, rules, {1: 3.0, 2: 4.0, 3: 2.0, 4: float("nan"), 5: 9.0}) == [
        [1],
        [1, 2],
        [3],
        [3, 4],
        [3, 5],
    ]


def test_no_number_is_never_the_best(tmp_path: Path) -> None:
    for mode in ("min", "max"):
        rules = CheckpointConfig(keep_last=1, keep_best=1, keep_best_mode=mode)
        assert save_all(tmp_path / mode, rules, {1: float("nan"), 2: 4.0, 3: float("nan")})[-1] == [2, 3]


def test_what_was_committed_last_stays_whatever_lies_there(tmp_path: Path) -> None:
    # A run that went back from a damaged step 12 to step 6.
    rules = CheckpointConfig(keep_last=1)
    for step in (3, 6, 12):
        write(tmp_path, step)
    (tmp_path / "step_99999999").mkdir()
    write(tmp_path, 9)
    retain(tmp_path, rules, 9)
    assert steps(tmp_path) == [9, 12, 99999999]


def test_a_damaged_one_pushes_no_good_one_out(tmp_path: Path) -> None:
    rules = CheckpointConfig(keep_last=2)
    for step in (3, 6):
        write(tmp_path, step)
    (committed_folder(tmp_path, 6) / MANIFEST).write_text("{")
    write(tmp_path, 9)
    retain(tmp_path, rules, 9)
    assert steps(tmp_path) == [3, 9]


@pytest.mark.parametrize("last", range(1, 7))
def test_a_deletion_that_is_cut_off_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    for step in (3, 6):
        write(tmp_path, step)
    done = 0

    def counted(real: object) -> object:
        def call(*arguments: object, **settings: object) -> object:
            nonlocal done
            done += 1
            if done >= last:
                raise KeyboardInterrupt
            return real(*arguments, **settings)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patched:
        for name in ("rename", "unlink", "rmdir", "fsync"):
            patched.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            retain(tmp_path, CheckpointConfig(keep_last=1), 6)
    assert newest_valid(tmp_path) == (committed_folder(tmp_path, 6), [])
    # Each folder is either complete or gone.
    for folder in committed(tmp_path):
        assert (folder / MANIFEST).is_file() and (folder / "a.distcp").is_file()
    assert len(clean(tmp_path)) == (last > 2)
    assert steps(tmp_path) == ([3, 6] if last <= 2 else [6])
