"""Checkpoint folders: written aside, checksummed, then renamed; found again by their manifests.

RUN/checkpoints/step_00000500/     committed: manifest.json has the SHA-256 of every file and of itself
RUN/checkpoints/.staging_00000500/ being written, or left by a crash; never read
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

MANIFEST = "manifest.json"
_PREFIX, _STAGING = "step_", ".staging_"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the folder or file and the mend."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    consumed_samples: int
    # The run's whole configuration.
    config: dict[str, Any]
    # The Llama's HuggingFace configuration.
    llama: dict[str, Any]
    # A hash of the frozen Llama's weights; empty where the checkpoint holds the Llama itself.
    base_hash: str
    # A hash of all that decides which samples a step takes.
    data_fingerprint: str
    # File name -> SHA-256.
    files: dict[str, str]
    # DPO: a hash of the checkpoint that its reference was read from.
    reference: str = ""


def staging_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint of this step is written before it is committed."""
    return checkpoints / f"{_STAGING}{step:08d}"


def committed_folder(checkpoints: Path, step: int) -> Path:
    """Where a committed checkpoint of this step lies."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def commit(staging: Path, final: Path, manifest: Manifest) -> None:
    """Checksum and sync every file of `staging`, add the manifest, and rename it to `final`."""
    files = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        files[str(path.relative_to(staging))] = _sync_and_hash(path)
    # As it will be read: JSON has no tuples and no keys but strings.
    body = json.loads(json.dumps({**asdict(manifest), "files": files}))
    (staging / MANIFEST).write_text(json.dumps({**body, "checksum": _checksum(body)}, indent=1))
    _sync_and_hash(staging / MANIFEST)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    _sync_folder(final.parent)


def retain(checkpoints: Path, keep_last: int) -> None:
    """Delete all but the newest committed checkpoints, and what crashes left. `keep_last` 0 keeps all."""
    for left in checkpoints.glob(f"{_STAGING}*"):
        shutil.rmtree(left)
    if keep_last:
        for old in _committed(checkpoints)[keep_last:]:
            shutil.rmtree(old)


def newest_valid(checkpoints: Path) -> tuple[Optional[Path], list[str]]:
    """The newest checkpoint whose files are all there and unchanged.

    Returns:
        Its folder (None without any), and what was wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints, and none is valid.
    """
    problems: list[str] = []
    found = _committed(checkpoints)
    for folder in found:
        try:
            read_manifest(folder, verify=True)
            return folder, problems
        except CheckpointError as error:
            problems.append(str(error))
    if found:
        raise CheckpointError("No valid checkpoint is left: " + " ".join(problems))
    return None, problems


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest:
    """What a checkpoint says of itself; with `verify`, every file is read and compared with its checksum.

    Raises:
        CheckpointError: no manifest, or a file that is missing or changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} is no checkpoint: it has no {MANIFEST}.")
    try:
        body = json.loads(path.read_text())
        if body.pop("checksum") != _checksum(body):
            raise ValueError("its checksum differs")
        manifest = Manifest(**body)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        # Damage may leave anything: no text, no JSON, no object, other keys.
        raise CheckpointError(f"{str(path)!r} is damaged ({error}).") from None
    if verify:
        for name, expected in manifest.files.items():
            file = folder / name
            if not file.is_file():
                raise CheckpointError(f"{str(folder)!r}: the file {name!r} is missing.")
            if _hash(file) != expected:
                raise CheckpointError(f"{str(folder)!r}: the file {name!r} is damaged (its checksum differs).")
    return manifest


def resolve(folder: str) -> Path:
    """A checkpoint's folder from a path to it, to its run's folder, or to the run's checkpoints: the newest valid one.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(folder)
    if (path / MANIFEST).is_file():
        return path
    for candidate in (path / "checkpoints", path):
        found = newest_valid(candidate)[0] if candidate.is_dir() else None
        if found:
            return found
    raise CheckpointError(f"There is no checkpoint in {folder!r}. Name a checkpoint's folder or its run's folder.")


def _checksum(body: dict[str, Any]) -> str:
    """Of a manifest's content."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _committed(checkpoints: Path) -> list[Path]:
    """Newest first."""
    found = [p for p in checkpoints.glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True)


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
