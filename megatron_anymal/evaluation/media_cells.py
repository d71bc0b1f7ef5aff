"""Media in the cells of a data set: contents of files, as `datasets` stores them, or names of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_anymal.data.prompt_encoder import MediaFile, read_media_file
from megatron_anymal.data.records import DataError

# First bytes of a file -> its extension, for contents that are stored without a name.
_SIGNATURES = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpg",
    b"GIF8": "gif",
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"ID3": "mp3",
    b"\xff\xfb": "mp3",
    b"\x1aE\xdf\xa3": "mkv",
    b"BM": "bmp",
}


@dataclass(frozen=True)
class MediaItem:
    """A media file of a sample, read when it is needed."""

    # Name in error messages.
    name: str
    # Returns its content.
    read: Callable[[], MediaFile]
    # Attributes of the media part, such as the rate of an IMU signal.
    attributes: Mapping[str, Any] = field(default_factory=dict)


def named_file(path: Path, where: str) -> MediaItem:
    """A file on disk.

    Raises:
        DataError: it does not exist; the message begins with `where`, the sample.
    """
    if not path.is_file():
        raise DataError(f"{where}: there is no media file {str(path)!r}. Complete the data set, or correct the path.")
    return MediaItem(str(path), lambda: read_media_file(path))


def file_in_cell(value: Any, where: str) -> MediaFile:
    """The file stored in a cell: bytes, or `datasets`' {"bytes": ..., "path": ...}.

    Raises:
        DataError: the cell holds no contents of a file; the message begins with `where`.
    """
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if not isinstance(data, bytes) or not data:
        raise DataError(
            f"{where}: the cell holds {str(value)[:60]!r} instead of a file. Save the data set with its media."
        )
    extension = Path(name).suffix.lstrip(".").lower() if name else ""
    return MediaFile(data, extension or _extension_of(data))


def _extension_of(data: bytes) -> str:
    """Extension by the first bytes; empty if they are unknown."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"WAVE": "wav", b"AVI ": "avi"}.get(data[8:12], "")
    if data[4:8] == b"ftyp":
        return "mp4"
    return next((extension for start, extension in _SIGNATURES.items() if data.startswith(start)), "")
