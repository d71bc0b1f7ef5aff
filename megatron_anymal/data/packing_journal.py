"""The journal of a packing: which shards are finished, and what was left out of them.

While shards are written it is `packing.jsonl.part` in their folder, so that an interrupted packing continues with the
first shard that is not finished. Afterwards it is `packing.jsonl` in the index folder, from which the index takes the
samples that were not packed.

Its first line describes the packing; each further line is one finished shard.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.data.left_out import INDEX_FOLDER, LeftOut
from megatron_anymal.data.tar.byte_source import is_local

JOURNAL = "packing.jsonl"
_UNFINISHED = f"{JOURNAL}.part"


@dataclass(frozen=True)
class PackedShard:
    """A finished shard: the samples of one stretch of the source."""

    # Position of the stretch, from 0.
    number: int
    # File name; empty if no sample of the stretch was packed.
    name: str
    # Size of the file.
    size: int
    # Samples in the shard.
    samples: int
    # The other samples of the stretch.
    left_out: Sequence[LeftOut]

    def to_line(self) -> str:
        """The line of the journal."""
        return json.dumps({**vars(self), "left_out": [entry.to_dict() for entry in self.left_out]}) + "\n"

    @staticmethod
    def of_line(line: str | bytes) -> PackedShard:
        """The shard of a line.

        Raises:
            ValueError, KeyError, TypeError: the line is damaged.
        """
        values = json.loads(line)
        left_out = [LeftOut.from_dict(entry) for entry in values.pop("left_out")]
        return PackedShard(left_out=left_out, **values)


class PackingJournal:
    """The journal of a packing in progress.

    Args:
        folder: of the shards.
        header: describes the packing. A journal with another header is of another packing and starts again.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]):
        self._folder, self._path = folder, folder / _UNFINISHED
        self.finished: dict[int, PackedShard] = {}
        line = json.dumps(header)
        # Written again: the last line may have been cut off.
        renewed = self._path.with_suffix(".new")
        with renewed.open("w") as file:
            file.write(line + "\n")
            for shard in _shards_of(self._path, line):
                if not shard.name or self._is_whole(shard):
                    file.write(shard.to_line())
                    self.finished[shard.number] = shard
        os.replace(renewed, self._path)
        names = {shard.name for shard in self.finished.values()}
        for part in folder.glob("*.tar.part"):
            if part.name.removesuffix(".part") not in names:
                part.unlink()

    def _is_whole(self, shard: PackedShard) -> bool:
        # Without .part if the packing was interrupted while its shards were being renamed.
        for path in (self.part(shard.name), self._folder / shard.name):
            if path.is_file() and path.stat().st_size == shard.size:
                return True
        return False

    def part(self, name: str) -> Path:
        """Path of a shard until the packing is complete."""
        return self._folder / f"{name}.part"

    def add(self, shard: PackedShard) -> None:
        """Record a finished shard, whose file is complete."""
        self.finished[shard.number] = shard
        with self._path.open("a") as file:
            file.write(shard.to_line())

    def complete(self) -> None:
        """Give the shards their names, remove all others in the folder, and move the journal next to the index."""
        names = [shard.name for shard in self.finished.values() if shard.name]
        # Only now: an error in the source must not cost the shards that the folder had before.
        for old in self._folder.glob("*.tar"):
            if old.name not in names:
                old.unlink()
        for name in names:
            if self.part(name).exists():
                os.replace(self.part(name), self._folder / name)
        (self._folder / INDEX_FOLDER).mkdir(exist_ok=True)
        os.replace(self._path, self._folder / INDEX_FOLDER / JOURNAL)

    def discard(self) -> None:
        """Remove the journal and the unfinished shards."""
        for part in self._folder.glob("*.tar.part"):
            part.unlink()
        self._path.unlink(missing_ok=True)


def write_journal(folder: Path, header: Mapping[str, Any], shards: Iterable[PackedShard]) -> None:
    """Write the journal of a packing that is complete.

    Args:
        folder: of the shards; the journal goes next to their index.
        header: describes the packing.
        shards: all of them, in the order of the source.
    """
    path = folder / INDEX_FOLDER / JOURNAL
    renewed = path.with_suffix(".new")
    with renewed.open("w") as file:
        file.write(json.dumps(header) + "\n")
        file.writelines(shard.to_line() for shard in shards)
    os.replace(renewed, path)


@dataclass(frozen=True)
class Packed:
    """Accounting of a source's samples, for the index of its shards."""

    # The source's file or folder.
    source: str
    # Number of samples in the source.
    samples: int
    # File system of the journal.
    fs: Any
    # Its path there.
    path: str

    def left_out(self) -> Iterator[LeftOut]:
        """The samples that were not packed, in the order of the source."""
        for line in itertools.islice(_lines(self.fs, self.path), 1, None):
            yield from PackedShard.of_line(line).left_out


def is_unfinished(folder: Path) -> bool:
    """Whether a packing into the folder was interrupted."""
    return (folder / _UNFINISHED).is_file()


def continues(folder: Path, header: Mapping[str, Any]) -> bool:
    """Whether the folder's shards are those of an interrupted packing with this header, which has renamed them."""
    sizes = {shard.name: shard.size for shard in _shards_of(folder / _UNFINISHED, json.dumps(header))}
    return all(sizes.get(path.name) == path.stat().st_size for path in folder.glob("*.tar"))


def packed_of(fs: Any, root: str, sizes: Mapping[str, int]) -> Optional[Packed]:
    """Accounting of the samples that were packed into shards; None for shards from elsewhere.

    Args:
        fs: file system of the shards.
        root: their folder on it.
        sizes: the shards that the folder holds now, and their sizes in bytes. If they are not those of the journal, it
            is of other shards.
    """
    path = f"{root}/{INDEX_FOLDER}/{JOURNAL}"
    if not fs.exists(path):
        return None
    names: dict[str, int] = {}
    lines = _lines(fs, path)
    header = json.loads(next(lines))
    for line in lines:
        shard = PackedShard.of_line(line)
        names.update({shard.name: shard.size} if shard.name else {})
    return Packed(header["source"], header["samples"], fs, path) if names == dict(sizes) else None


def _lines(fs: Any, path: str) -> Iterator[bytes]:
    with open(path, "rb") if is_local(fs) else io.BytesIO(fs.cat_file(path)) as file:
        yield from file


def _shards_of(path: Path, header: str) -> Iterator[PackedShard]:
    """The shards of a journal with this header, up to the first damaged line."""
    if not path.is_file():
        return
    with path.open() as file:
        if file.readline().rstrip("\n") != header:
            return
        for line in file:
            try:
                yield PackedShard.of_line(line)
            except (ValueError, KeyError, TypeError):
                return
