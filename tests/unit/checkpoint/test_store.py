"""Checkpoint folders are committed completely or not at all, and intact ones are found when others are damaged."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_anymal.checkpoint.store import (
    MANIFEST,
    CheckpointError,
    Manifest,
    clean,
    commit,
    committed_folder,
    newest_valid,
    read_manifest,
    resolve,
    staging_folder,
)


def manifest(step: int) -> Manifest:
    return Manifest(step, 8 * step, {"model": {"seed": 1}}, {"hidden_size": 4}, "base", "data", {})


def write(checkpoints: Path, step: int, content: bytes = b"weights") -> Path:
    staging, final = staging_folder(checkpoints, step), committed_folder(checkpoints, step)
    (staging / "deep").mkdir(parents=True)
    (staging / "a.distcp").write_bytes(content + str(step).encode() * 100)
    (staging / "deep" / "b.pt").write_bytes(b"more")
    commit(staging, final, manifest(step))
    return final


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Steps 3, 6 and 12, saved out of order."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (3, 12, 6):
        write(folder, step)
    return folder


def test_commit_and_read_back(checkpoints: Path) -> None:
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step_00000003", "step_00000006", "step_00000012"]
    folder = committed_folder(checkpoints, 6)
    stored_manifest = read_manifest(folder, verify=True)
    assert set(stored_manifest.files) == {"a.distcp", "deep/b.pt"}
    assert {**vars(stored_manifest), "files": {}} == vars(manifest(6))


def test_commit_replaces_one_of_the_same_step(checkpoints: Path) -> None:
    folder = write(checkpoints, 6, b"other weights")
    assert (folder / "a.distcp").read_bytes().startswith(b"other")
    assert read_manifest(folder, verify=True).step == 6


def test_the_newest_is_found(checkpoints: Path) -> None:
    assert newest_valid(checkpoints) == (committed_folder(checkpoints, 12), [])


def test_order_is_that_of_the_steps_not_of_the_names(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999)
    newest = write(tmp_path, 100_000_000)
    assert newest_valid(tmp_path)[0] == newest


def test_no_checkpoint(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "none") == (None, [])
    (tmp_path / "step_of_nothing").mkdir()
    (tmp_path / "step_00000001").write_text("a file")
    assert newest_valid(tmp_path) == (None, [])


def test_what_a_crash_left_is_ignored_and_removed(checkpoints: Path) -> None:
    left = staging_folder(checkpoints, 15)
    left.mkdir()
    (left / "a.distcp").write_bytes(b"half")
    assert newest_valid(checkpoints) == (committed_folder(checkpoints, 12), [])
    (checkpoints / ".deleting_00000003").mkdir()
    (checkpoints / ".deleting_00000004").write_text("a file")
    assert clean(checkpoints) == [".deleting_00000003", ".deleting_00000004", ".staging_00000015"]
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step_00000003", "step_00000006", "step_00000012"]


def test_commit_replaces_what_lies_in_its_place(tmp_path: Path) -> None:
    committed_folder(tmp_path, 6).write_text("a file")
    assert newest_valid(tmp_path) == (None, [])
    write(tmp_path, 6)
    assert newest_valid(tmp_path) == (committed_folder(tmp_path, 6), [])
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000006"]


def test_commit_of_known_files_does_not_read_them_again(tmp_path: Path) -> None:
    staging, final = staging_folder(tmp_path, 3), committed_folder(tmp_path, 3)
    staging.mkdir()
    (staging / "known").write_bytes(b"12")
    (staging / "new").write_bytes(b"34")
    commit(staging, final, manifest(3), digests={"known": "its hash"})
    assert read_manifest(final).files == {"known": "its hash", "new": hashlib.sha256(b"34").hexdigest()}


def test_commit_refuses_where_a_known_file_is_gone(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path, 3)
    staging.mkdir()
    with pytest.raises(FileNotFoundError, match=r"'[^']*known' was written and is gone"):
        commit(staging, committed_folder(tmp_path, 3), manifest(3), digests={"known": "its hash"})
    assert newest_valid(tmp_path) == (None, [])


def test_a_file_that_cannot_be_read_is_damage(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = committed_folder(checkpoints, 12) / "a.distcp"
    real = io.open

    def failing(path: Any, *arguments: Any, **settings: Any) -> Any:
        if Path(path) == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **settings)

    monkeypatch.setattr(io, "open", failing)
    folder, problems = newest_valid(checkpoints)
    assert folder == committed_folder(checkpoints, 6)
    assert "'a.distcp' cannot be read (Input/output error)" in problems[0]


def flip(path: Path, offset: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x80
    path.write_bytes(bytes(data))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE = {
    "flipped-byte": (lambda folder: flip(folder / "deep" / "b.pt"), "'deep/b.pt' is damaged"),
    "cut-off": (lambda folder: (folder / "a.distcp").write_bytes(b"weig"), "'a.distcp' is damaged"),
    "missing-file": (lambda folder: (folder / "a.distcp").unlink(), "'a.distcp' is missing"),
    "no-manifest": (lambda folder: (folder / MANIFEST).unlink(), "no manifest.json"),
    "cut-off-manifest": (lambda folder: (folder / MANIFEST).write_text('{"step": 12, "co'), "manifest.json"),
    "binary-manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\x80\x00\xff" * 50), "manifest.json"),
    "flipped-manifest": (lambda folder: flip(folder / MANIFEST, 3), "manifest.json"),
    "zeroed-manifest": (lambda folder: (folder / MANIFEST).write_bytes(bytes(100)), "manifest.json"),
    "list": (lambda folder: (folder / MANIFEST).write_text("[1]"), "manifest.json"),
    "other-keys": (lambda folder: (folder / MANIFEST).write_text('{"step": 12}'), "manifest.json"),
    # Still valid JSON with all its keys: one digit of the sample count is changed.
    "changed-number": (
        lambda folder: replace(folder / MANIFEST, '"consumed_samples": 96', '"consumed_samples": 97'),
        "checksum",
    ),
    "changed-hash": (lambda folder: replace(folder / MANIFEST, '"base"', '"bass"'), "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(damage: str, checkpoints: Path) -> None:
    harm, expected_message = DAMAGE[damage]
    harm(committed_folder(checkpoints, 12))
    folder, problems = newest_valid(checkpoints)
    assert folder == committed_folder(checkpoints, 6)
    assert len(problems) == 1 and expected_message in problems[0] and "step_00000012" in problems[0]


def test_none_left_names_all(checkpoints: Path) -> None:
    for step in (3, 6, 12):
        flip(committed_folder(checkpoints, step) / "a.distcp")
    with pytest.raises(CheckpointError) as error:
        newest_valid(checkpoints)
    for step in (3, 6, 12):
        assert f"step_{step:08d}" in str(error.value)


def test_resolve_takes_a_checkpoint_a_run_or_its_checkpoints(checkpoints: Path, tmp_path: Path) -> None:
    newest = committed_folder(checkpoints, 12)
    assert resolve(str(newest)) == newest
    assert resolve(str(checkpoints)) == newest
    assert resolve(str(checkpoints.parent)) == newest
    assert resolve(str(committed_folder(checkpoints, 3))).name == "step_00000003"
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    for wrong, why in {
        tmp_path / "none": r"There is no folder '.*none'\. Give the folder",
        tmp_path: r"no checkpoint in '.*'\. Give the folder",
        tmp_path / "begun": "this run has not saved one yet. Give the folder",
    }.items():
        with pytest.raises(CheckpointError, match=why):
            resolve(str(wrong))
    flip(newest / "a.distcp")
    assert resolve(str(checkpoints.parent)) == committed_folder(checkpoints, 6)
