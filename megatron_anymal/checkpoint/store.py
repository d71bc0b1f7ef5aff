"""Checkpoint folders: written aside, checksummed, then renamed; found again by their manifests.

RUN/checkpoints/step_00000500/      committed: manifest.json has the SHA-256 of every file and of itself
RUN/checkpoints/.staging_00000500/  being written, or left by a crash; never read
RUN/checkpoints/.deleting_00000500/ being deleted, or left by a crash; never read
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any, Optional

from megatron_anymal.resilience.exit_codes import Exit

MANIFEST = "manifest.json"
_PREFIX, _STAGING, _DELETING = "step_", ".staging_", ".deleting_"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the folder or file and the mend."""


class NoneLeft(CheckpointError):
    """A run has checkpoints, and none of them is valid."""

    exit_code = Exit.NO_CHECKPOINT


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
    # What the validation after this step measured; empty where there was none.
    metrics: dict[str, float] = field(default_factory=dict)
    # A hash of the tokenizer; empty where it was not noted.
    tokenizer: str = ""


def staging_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint of this step is written before it is committed."""
    return checkpoints / f"{_STAGING}{step:08d}"


def committed_folder(checkpoints: Path, step: int) -> Path:
    """Where a committed checkpoint of this step lies."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def committed(checkpoints: Path) -> list[Path]:
    """Committed checkpoints, damaged ones too, newest first."""
    found = [p for p in checkpoints.glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a committed checkpoint's name."""
    return int(folder.name.removeprefix(_PREFIX))


def commit(staging: Path, final: Path, manifest: Manifest, digests: Optional[Mapping[str, str]] = None) -> None:
    """Checksum and sync every file of `staging`, add the manifest, and rename it to `final`.

    Args:
        digests: file name -> SHA-256 of files that are known, and synced, already.

    Raises:
        OSError: it could not be committed; nothing at `final` was lost.
    """
    digests = digests or {}
    files = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        name = str(path.relative_to(staging))
        files[name] = digests[name] if name in digests else _sync_and_hash(path)
    if lost := digests.keys() - files.keys():
        raise FileNotFoundError(f"{str(staging / min(lost))!r} was written and is gone.")
    # As it will be read: JSON has no tuples and no keys but strings.
    body = json.loads(json.dumps({**asdict(manifest), "files": files}))
    with (staging / MANIFEST).open("w") as file:
        file.write(json.dumps({**body, "checksum": _checksum(body)}, indent=1))
        file.flush()
        os.fsync(file.fileno())
    for folder in {(staging / name).parent for name in [*files, MANIFEST]}:
        _sync_folder(folder)
    replaced = _set_aside(final) if final.exists() else None
    staging.rename(final)
    _sync_folder(final.parent)
    if replaced:
        _remove(replaced)


def delete(folder: Path) -> None:
    """Delete a committed checkpoint: whatever happens meanwhile, it is never seen in part."""
    aside = _set_aside(folder)
    _sync_folder(folder.parent)
    _remove(aside)


def clean(checkpoints: Path) -> list[str]:
    """Remove what crashes left, half written or half deleted. Not while a checkpoint is being written.

    Returns:
        The names of what was removed.
    """
    left = sorted([*checkpoints.glob(f"{_STAGING}*"), *checkpoints.glob(f"{_DELETING}*")])
    for path in left:
        _remove(path)
    return [path.name for path in left]


def newest_valid(checkpoints: Path) -> tuple[Optional[Path], list[str]]:
    """The newest checkpoint whose files are all there and unchanged.

    Returns:
        Its folder (None without any), and what was wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints, and none is valid.
    """
    problems: list[str] = []
    found = committed(checkpoints)
    for folder in found:
        try:
            read_manifest(folder, verify=True)
            return folder, problems
        except CheckpointError as error:
            problems.append(str(error))
    if found:
        raise none_left(problems)
    return None, problems


def none_left(problems: Iterable[str]) -> NoneLeft:
    """The error where every checkpoint of a run is damaged."""
    return NoneLeft(
        f"No valid checkpoint is left: {' '.join(problems)} Restore one from a copy, or start anew in another folder."
    )


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest:
    """What a checkpoint says of itself; with `verify`, every file is read and compared with its checksum.

    Raises:
        CheckpointError: no manifest, or a file that is missing or changed.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text())
        if body.pop("checksum") != _checksum(body):
            raise ValueError("its checksum differs")
        manifest = Manifest(**body)
        if outside := [name for name in manifest.files if PurePath(name).is_absolute() or ".." in PurePath(name).parts]:
            raise ValueError(f"it names {outside[0]!r}, a file outside of the checkpoint")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{str(folder)!r} is no checkpoint: it has no {MANIFEST}.") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        # Damage may leave anything: no text, no JSON, no object, other keys.
        raise CheckpointError(f"{str(path)!r} is damaged ({error}).") from None
    if verify:
        for name, expected in manifest.files.items():
            verify_file(folder, name, expected)
    return manifest


def verify_file(folder: Path, name: str, expected: str) -> None:
    """Read a checkpoint's file and compare it with its checksum.

    Raises:
        CheckpointError: it is missing, changed, or cannot be read.
    """
    file = folder / name
    try:
        found = _hash(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(f"{str(folder)!r}: the file {name!r} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{str(folder)!r}: the file {name!r} cannot be read ({error.strerror}).") from None
    if found != expected:
        raise CheckpointError(f"{str(folder)!r}: the file {name!r} is damaged (its checksum differs).")


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


def sync_tree(folder: Path) -> None:
    """Put every file under a folder, and the folders' own entries, on disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _checksum(body: dict[str, Any]) -> str:
    """Of a manifest's content."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


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


def _set_aside(path: Path) -> Path:
    """Rename a committed checkpoint, or a file in its place, to a name that is never read."""
    aside = path.parent / f"{_DELETING}{path.name.removeprefix(_PREFIX)}"
    _remove(aside)
    return path.rename(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
