"""Conversion of a manifest to shards by any number of machines: each writes a part of the shards of a whole run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megatron_anymal.config import DEFAULT_LIMITS, LimitsConfig
from megatron_anymal.data.manifest import existing, shard_lines, shard_name, write_shard
from megatron_anymal.data.part_files import PartFiles
from megatron_anymal.data.part_of import PartOf
from megatron_anymal.data.records import DataError


def write_part(
    manifest: str, out: str, part: PartOf, samples_per_shard: int = 2000, limits: LimitsConfig = DEFAULT_LIMITS
) -> list[str]:
    """Write each N-th shard of a manifest, except for those that the part has written before.

    Returns:
        File names of the part's shards.

    Raises:
        DataError: naming the invalid line, or the media file that is missing or too large; or the folder has other
            shards.
    """
    path, folder = existing(manifest), Path(out)
    _require_same(manifest, out, {"sha256": _sha256(path), "samples_per_shard": samples_per_shard})
    names = []
    seen: set[str] = set()
    for shard, lines in shard_lines(path, samples_per_shard, limits, part.takes):
        names.append(shard_name(shard))
        if not (folder / names[-1]).exists():
            unfinished = folder / f"{names[-1]}.part"
            write_shard(unfinished, lines, path.parent, limits, seen)
            unfinished.rename(folder / names[-1])
    # Part 1 takes the first shard, so that it has none only if there are no lines.
    if not names and part.number == 1:
        raise DataError(f"The manifest {manifest!r} has no lines.")
    return names


def _require_same(manifest: str, out: str, note: dict[str, Any]) -> None:
    """Take a folder for the shards of a manifest.

    Raises:
        DataError: it has shards of another manifest, or of unknown origin.
    """
    parts = PartFiles(out)
    known = parts.manifest()
    if known is not None and known != note:
        what = "another manifest" if known["sha256"] != note["sha256"] else "another --samples-per-shard"
        raise DataError(
            f"{out!r} holds parts that were made with {what} than {manifest!r} now. Name another folder, or empty it."
        )
    if known is None:
        if any(Path(out).glob("*.tar")):
            raise DataError(f"{out!r} already holds shards. Name another folder, or empty it.")
        parts.create()
        parts.set_manifest(note)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
