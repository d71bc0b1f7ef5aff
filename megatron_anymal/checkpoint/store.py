"""Checkpoint folders: written to a staging directory, checksummed, then atomically renamed.

RUN/checkpoints/step_00000500/      committed: manifest.json has the SHA-256 of every file and of itself
RUN/checkpoints/.staging_00000500/  being written, or left behind by a crash; never read
RUN/checkpoints/.deleting_00000500/ being deleted, or left behind by a crash; never read
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

from megatron_anymal.data.journal import sync_folder
from megatron_anymal.resilience.exit_codes import Exit

MANIFEST = "manifest.json"
_PREFIX, _STAGING, _DELETING = "step_", ".staging_", ".deleting_"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the folder or file and the fix."""


class NoneLeft(CheckpointError):
    """A run has checkpoints, but none of them is valid."""

    exit_code = Exit.NO_CHECKPOINT


@dataclass(frozen=True)
class Manifest:
    """Description of a checkpoint, stored with it as manifest.json."""

    # Updates made before the checkpoint.
    step: int
    # Samples of the global order that these updates consumed.
    consumed_samples: int
    # The run's full configuration.
    config: dict[str, Any]
    # The Llama's HuggingFace configuration.
    llama: dict[str, Any]
    # Hash of the frozen Llama's weights; empty if the checkpoint holds the Llama itself.
    base_hash: str
    # Hash of everything that determines which samples a step consumes, apart from what is in them.
    data_fingerprint: str
    # File name -> SHA-256.
    files: dict[str, str]
    # DPO: hash of the checkpoint that the reference model was loaded from.
    reference: str = ""
    # Validation metrics after this step; empty if there was no validation.
    metrics: dict[str, float] = field(default_factory=dict)
    # Hash of the tokenizer; empty if it was not recorded.
    tokenizer: str = ""
    # Hash of what is in the samples; empty if an index did not record it.
    data_content: str = ""


def staging_folder(checkpoints: Path, step: int) -> Path:
    """Staging directory in which the checkpoint of this step is written before it is committed."""
    return checkpoints / f"{_STAGING}{step:08d}"


def committed_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the committed checkpoint of this step."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def committed(checkpoints: Path) -> list[Path]:
    """Committed checkpoints, including damaged ones, newest first."""
    folders = [p for p in checkpoints.glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Step number from the name of a committed checkpoint."""
    return int(folder.name.removeprefix(_PREFIX))


def commit(staging: Path, final: Path, manifest: Manifest, digests: Optional[Mapping[str, str]] = None) -> None:
    """Checksum and fsync every file in `staging`, add the manifest, and rename the folder to `final`.

    Args:
        digests: file name -> SHA-256 of files that are already hashed and synced.

    Raises:
        OSError: the checkpoint could not be committed; an existing checkpoint at `final` is not lost.
    """
    digests = digests or {}
    files = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        name = str(path.relative_to(staging))
        files[name] = digests[name] if name in digests else _sync_and_hash(path)
    if lost := digests.keys() - files.keys():
        raise FileNotFoundError(f"{str(staging / min(lost))!r} was written and is gone.")
    # Round-trip first, so that the checksum covers what a reader sees: JSON has no tuples and only string keys.
    body = json.loads(json.dumps({**asdict(manifest), "files": files}))
    with (staging / MANIFEST).open("w") as file:
        file.write(json.dumps({**body, "checksum": _checksum(body)}, indent=1))
        file.flush()
        os.fsync(file.fileno())
    for folder in {(staging / name).parent for name in [*files, MANIFEST]}:
        sync_folder(folder)
    replaced = _set_aside(final) if final.exists() else None
    staging.rename(final)
    sync_folder(final.parent)
    if replaced:
        _remove(replaced)


def delete(folder: Path) -> None:
    """Delete a committed checkpoint atomically: no reader ever sees a partially deleted one."""
    aside = _set_aside(folder)
    sync_folder(folder.parent)
    _remove(aside)


def clean(checkpoints: Path) -> list[str]:
    """Remove half-written and half-deleted checkpoints left by crashes. Must not run during a save.

    Returns:
        Names of the removed folders.
    """
    left = sorted([*checkpoints.glob(f"{_STAGING}*"), *checkpoints.glob(f"{_DELETING}*")])
    for path in left:
        _remove(path)
    return [path.name for path in left]


def newest_valid(checkpoints: Path) -> tuple[Optional[Path], list[str]]:
    """Find the newest checkpoint whose files are all present and unchanged.

    Returns:
        Its folder (None if there are no checkpoints), and the problems of newer ones.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    problems: list[str] = []
    folders = committed(checkpoints)
    for folder in folders:
        try:
            read_manifest(folder, verify=True)
            return folder, problems
        except CheckpointError as error:
            problems.append(str(error))
    if folders:
        raise none_left(problems)
    return None, problems


def none_left(problems: Iterable[str]) -> NoneLeft:
    """Error for a run whose checkpoints are all damaged."""
    return NoneLeft(
        f"No valid checkpoint is left: {' '.join(problems)} Restore one from a backup, or start over in another folder."
    )


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest:
    """Read a checkpoint's manifest; with `verify`, also read every file and compare it with its checksum.

    Raises:
        CheckpointError: the manifest is missing or damaged; with `verify`, also if a file is missing or changed.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text())
        if body.pop("checksum") != _checksum(body):
            raise ValueError("its checksum differs")
        manifest = Manifest(**body)
        if outside := [name for name in manifest.files if PurePath(name).is_absolute() or ".." in PurePath(name).parts]:
            raise ValueError(f"it names {outside[0]!r}, a file outside the checkpoint")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{str(folder)!r} is not a checkpoint: it has no {MANIFEST}.") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        # A damaged manifest may be anything: not text, not JSON, not an object, or with other keys.
        raise CheckpointError(f"{str(path)!r} is damaged ({error}).") from None
    if verify:
        for name, expected in manifest.files.items():
            verify_file(folder, name, expected)
    return manifest


def verify_file(folder: Path, name: str, expected: str) -> None:
    """Read one file of a checkpoint and compare it with its checksum.

    Raises:
        CheckpointError: the file is missing, changed or unreadable.
    """
    file = folder / name
    try:
        actual = _hash(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(f"{str(folder)!r}: the file {name!r} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{str(folder)!r}: the file {name!r} cannot be read ({error.strerror}).") from None
    if actual != expected:
        raise CheckpointError(f"{str(folder)!r}: the file {name!r} is damaged (its checksum differs).")


def resolve(folder: str) -> Path:
    """Resolve the path of a checkpoint, of a run, or of a run's checkpoints folder to a checkpoint.

    For the latter two it is the newest valid one.

    Raises:
        CheckpointError: there is no valid checkpoint.
    """
    path = Path(folder)
    if (path / MANIFEST).is_file():
        return path
    for candidate in (path / "checkpoints", path):
        newest = newest_valid(candidate)[0] if candidate.is_dir() else None
        if newest:
            return newest
    raise CheckpointError(f"{_why_none(path)} Give the folder of a checkpoint or of a run.")


def _why_none(folder: Path) -> str:
    """Why a folder has no checkpoint, as a sentence."""
    if not folder.is_dir():
        return f"There is no folder {str(folder)!r}."
    if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file():
        return f"There is no checkpoint in {str(folder)!r}: this run has not saved one yet."
    return f"There is no checkpoint in {str(folder)!r}."


def sync_tree(folder: Path) -> None:
    """Fsync every file and directory under a folder, and the folder itself."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _checksum(body: dict[str, Any]) -> str:
    """Checksum of a manifest's content."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside(path: Path) -> Path:
    """Rename a committed checkpoint, or a file of that name, to a name that is never read."""
    aside = path.parent / f"{_DELETING}{path.name.removeprefix(_PREFIX)}"
    _remove(aside)
    return path.rename(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
