"""Sources of samples and their records: manifests, and data sets in the layouts of their makers (data/sources)."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional

from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_samples import MAX_KEY_BYTES, SampleError


@dataclass(frozen=True)
class Record:
    """A sample as its source lists it."""

    # File and line or position, for messages.
    where: str
    # Position in the source, from 1; the key of a sample that has none.
    number: int
    # The sample's JSON (data/samples.py); media are paths relative to the source's folder, or names in `contents`.
    value: dict[str, Any] = field(default_factory=dict)
    # The key that the source states; None or "" if it states none.
    key: Any = None
    # Further values that the source lists for the sample, for filters.
    columns: Mapping[str, Any] = field(default_factory=dict)
    # Media that are not files of their own, by name; a call reads one, or raises SampleError.
    contents: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    # Why the sample cannot be used; None if nothing is known to be wrong.
    wrong: Optional[SampleError] = None

    def shard_key(self) -> str:
        """The sample's key in the shard. Dots are replaced, because WebDataset ends the key at the first dot.

        Raises:
            DataError: the key is neither a string nor an integer, is too long, or has control characters.
        """
        if self.key is None or self.key == "":
            return f"{self.number:09d}"
        if isinstance(self.key, bool) or not isinstance(self.key, (str, int)):
            raise DataError(f"{self.where}: the key {self.key!r} must be a string or an integer.")
        key = str(self.key).replace(".", "_")
        if not key.isprintable() or key.rpartition("/")[2] == "":
            raise DataError(f"{self.where}: the key {key[:80]!r} contains characters that a file name cannot have.")
        if len(key.encode()) > MAX_KEY_BYTES:
            raise DataError(f"{self.where}: the key has {len(key.encode())} bytes, above {MAX_KEY_BYTES}.")
        return key


class Source(ABC):
    """Samples with media, to be packed into shards.

    Args:
        path: the file or folder that lists the samples.
        base: folder that the paths of media are relative to.
    """

    # How messages name `base`.
    base_name: ClassVar[str] = "the folder of --media"

    def __init__(self, path: str, base: Path):
        self.path, self.base = path, base

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """The samples in order; each call starts again and yields the same ones.

        Raises:
            DataError: the source cannot be read; a sample that cannot be used is a record with `wrong` instead.
        """

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The files that list the samples; a change in one of them makes an interrupted packing start again."""

    def settings(self) -> Mapping[str, Any]:
        """The options that the records depend on."""
        return {}

    def count(self) -> int:
        """Number of samples. Reads the whole list, so that an error in it is found before anything is written.

        Raises:
            DataError: the source cannot be read.
        """
        return sum(1 for _ in self.records())

    def remarks(self) -> Sequence[str]:
        """Notes for the user about parts of the source that are not samples."""
        return ()

    def fingerprint(self, options: Mapping[str, Any]) -> str:
        """Hash of everything that the packed shards depend on, except for the content of the media files.

        Args:
            options: of the packing.
        """
        files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files()]
        settings = {"path": self.path, "base": str(self.base), **self.settings()}
        stated = json.dumps([type(self).__name__, settings, files, dict(options)], sort_keys=True, default=str)
        return hashlib.blake2b(stated.encode(), digest_size=16).hexdigest()
