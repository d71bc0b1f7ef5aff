"""Build tar archives from bytes, including damaged ones."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

BLOCK = 512


def tar_bytes(members: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Bytes of a tar archive; member names may repeat."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    """Write the archive of `tar_bytes` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, form))
    return path


def header_of(archive: bytes, name: str) -> int:
    """Offset of a member's header."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getmember(name).offset


def with_checksum(block: bytes) -> bytes:
    """A header block with its checksum recomputed."""
    blank = block[:148] + b" " * 8 + block[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def changed_header(archive: bytes, name: str, at: int, value: bytes, *, checksum: bool = True) -> bytes:
    """The archive with one field of a member's header replaced and the checksum recomputed or left unchanged."""
    start = header_of(archive, name)
    block = archive[start : start + BLOCK]
    block = block[:at] + value + block[at + len(value) :]
    return archive[:start] + (with_checksum(block) if checksum else block) + archive[start + BLOCK :]
