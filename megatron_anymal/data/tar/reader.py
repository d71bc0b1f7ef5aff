"""Tar reader that accounts for every byte of an archive.

Python's `tarfile` takes a damaged header for the end of the archive and trusts the sizes that headers state. This
reader validates each header before using it, reports everything it cannot use with its offset, and resumes at the next
valid header after damaged bytes. It reads the formats that occur in practice: v7, POSIX ustar and pax, and GNU.

Layout (POSIX.1-2017, pax, "ustar Interchange Format"): blocks of 512 bytes. A header block precedes each member's data,
which is padded to whole blocks. Two blocks of zeros end the archive, and writers pad the file to whole records with
further zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Optional

from megatron_anymal.data.tar.byte_source import ByteSource
from megatron_anymal.data.tar.headers import (
    BLOCK,
    GNU_LONG_LINK,
    GNU_LONG_NAME,
    GNU_SPARSE,
    PAX_GLOBAL,
    PAX_NEXT,
    Extension,
    Header,
    is_utf8,
    padded,
    parse_header,
    stated_size,
)

# GNU tar and Python's tarfile pad archives to a multiple of this.
RECORD = 20 * BLOCK
_REGULAR = b"0\0 7"
_DIRECTORIES = b"5D"
_LABELS = b"V"
_NOT_FILES = {
    ord("1"): "is a hard link, not a file; pack files themselves (tar --dereference --hard-dereference)",
    ord("2"): "is a symbolic link, not a file; pack files themselves (tar --dereference --hard-dereference)",
    ord("3"): "is a character device, not a file",
    ord("4"): "is a block device, not a file",
    ord("6"): "is a FIFO, not a file",
    ord("M"): "continues a file of another archive",
}
_EXTENSIONS = (GNU_LONG_NAME, GNU_LONG_LINK, PAX_GLOBAL, *PAX_NEXT)
_NO_EXTENSION = Extension()
# Entry types without data, regardless of the size in the header.
_WITHOUT_DATA = b"123456"
# Chunk size for scanning damaged bytes for the next valid header.
_SCAN_BYTES = 256 * BLOCK
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


class TarMember(NamedTuple):
    """A regular file in an archive. Offsets and sizes are in bytes."""

    # Path in the archive.
    name: str
    # Offset of the first header block, including extension headers.
    header_offset: int
    # Offset of the data.
    offset: int
    # Size of the data.
    size: int


@dataclass(frozen=True)
class TarProblem:
    """A part of an archive that is not a readable file, with its byte range."""

    # One of the ledger's codes (data/left_out.py).
    code: str
    # Bytes from the start of the archive.
    offset: int
    # Length in bytes.
    length: int
    # What is wrong, for the user.
    reason: str
    # The member's name, if it is known.
    name: str = ""
    # Whether members may be missing here, so that the samples on either side may be incomplete.
    tears: bool = False


@dataclass(frozen=True)
class TarPassed:
    """An entry that is not a file and is skipped: a directory or a volume label."""

    # Path in the archive.
    name: str
    # "directories" or "volume labels".
    what: str


TarEntry = TarMember | TarProblem | TarPassed


class TarError(ValueError):
    """A file that is not an uncompressed tar archive. The message states the actual format, or the reason."""


@dataclass
class ByteCounts:
    """Number of bytes of an archive by use; after a complete pass they add up to its size."""

    # Header blocks, including extension headers and their data.
    headers: int = 0
    # Data of files.
    data: int = 0
    # Zeros that fill the last block of a member's data.
    padding: int = 0
    # Blocks of zeros at the end of the archive.
    end: int = 0
    # Everything that cannot be read as one of these.
    damaged: int = 0

    @property
    def total(self) -> int:
        """Sum of all counts."""
        return self.headers + self.data + self.padding + self.end + self.damaged


class TarWalk:
    """One pass over an archive.

    Args:
        source: the archive.
        max_header_bytes: maximum size of an extension header (long names, pax records).
    """

    def __init__(self, source: ByteSource, max_header_bytes: int):
        self._source, self._max_header_bytes = source, max_header_bytes
        self.bytes = ByteCounts()
        self._at = 0
        self._ended = False

    def __iter__(self) -> Iterator[TarEntry]:
        """All entries, in the order of the file.

        Raises:
            TarError: the archive is empty, compressed, or contains no valid header.
            OSError: the archive cannot be read.
        """
        self._refuse_other_files()
        size = self._source.size
        while self._at < size:
            block = self._source.read_at(self._at, BLOCK)
            if not block.strip(b"\0"):
                yield from self._zeros()
                continue
            header = parse_header(block)
            if header is None:
                yield self._damaged("a block that is not a valid tar header")
                continue
            entry = self._entry(header)
            if entry is not None:
                yield entry
        if not self._ended:
            yield TarProblem(
                "no_end",
                size,
                0,
                "the archive has no end-of-archive blocks: writing was interrupted, or it is truncated",
                tears=True,
            )
        assert self.bytes.total == size, f"{self.bytes} do not add up to the archive's {size} bytes"

    def _refuse_other_files(self) -> None:
        start = self._source.read_at(0, BLOCK)
        if not start:
            raise TarError("is empty (0 bytes)")
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise TarError(
                    f"is a {name} file, not an uncompressed tar archive: samples are read by byte range, so "
                    "decompress it first"
                )
        if start.strip(b"\0") and parse_header(start) is None and self._next_sound(BLOCK) is None:
            raise TarError("is not a tar archive: it has no valid header")

    def _zeros(self) -> Iterator[TarEntry]:
        """A run of zero blocks: the end of the archive, the boundary of two concatenated archives, or a hole."""
        start, end = self._at, self._end_of_zeros(self._at)
        self._at = end
        length = end - start
        if end >= self._source.size:
            self.bytes.end += length
            self._ended = True
            if length > 2 * BLOCK + RECORD:
                yield TarProblem(
                    "long_end",
                    start,
                    length,
                    f"the archive ends with {length} bytes of zeros, more than most writers add: if the last members "
                    "are missing, they were overwritten",
                )
        elif length >= 2 * BLOCK and end % RECORD == 0:
            self.bytes.end += length
            yield TarProblem(
                "joined",
                start,
                length,
                "end-of-archive blocks are followed by another archive, which is also read. If these are not "
                "concatenated archives, members were overwritten with zeros",
            )
        else:
            self.bytes.damaged += length
            yield TarProblem("damaged", start, length, f"{length} bytes of zeros between members", tears=True)

    def _end_of_zeros(self, start: int) -> int:
        at = start
        while at < self._source.size:
            chunk = self._source.read_at(at, _SCAN_BYTES)
            rest = chunk.lstrip(b"\0")
            if rest:
                return at + (len(chunk) - len(rest)) // BLOCK * BLOCK
            at += len(chunk)
        return at

    def _damaged(self, what: str) -> TarProblem:
        """Count everything up to the next valid header as damaged, and continue there."""
        start = self._at
        following = self._stated_next(start)
        if following is None:
            following = self._next_sound(start + BLOCK)
        stop = self._source.size if following is None else following
        self._at, self._ended = stop, following is None
        self.bytes.damaged += stop - start
        outlook = "nothing readable follows" if following is None else f"reading continues at offset {stop}"
        return TarProblem("damaged", start, stop - start, f"{what} at offset {start}; {outlook}", tears=True)

    def _stated_next(self, start: int) -> Optional[int]:
        """Offset of the next header according to the size in a damaged header, if the next header is valid.

        This skips a nested archive as a whole if only the checksum or the name in its own header is damaged.
        """
        block = self._source.read_at(start, BLOCK)
        size = stated_size(block)
        if size is None:
            return None
        following = start + BLOCK + padded(size)
        if following >= self._source.size or parse_header(self._source.read_at(following, BLOCK)) is None:
            return None
        return following

    def _next_sound(self, start: int) -> Optional[int]:
        """Offset of the first valid header at or after `start`."""
        for at in range(start, self._source.size, _SCAN_BYTES):
            chunk = self._source.read_at(at, _SCAN_BYTES)
            for offset in range(0, len(chunk), BLOCK):
                block = chunk[offset : offset + BLOCK]
                # The checksum field alone rules out most blocks of media data.
                if block[148:156].strip(b" \0").isdigit() and parse_header(block) is not None:
                    return at + offset
        return None

    def _entry(self, header: Header) -> Optional[TarEntry]:
        """Read a member, including the extension headers before it; None for a global header at the end."""
        start = self._at
        extension = _NO_EXTENSION
        while header.type in _EXTENSIONS:
            extension = Extension() if extension is _NO_EXTENSION else extension
            problem = self._extend(header, extension)
            if problem is not None:
                return problem
            block = self._source.read_at(self._at, BLOCK)
            following = parse_header(block)
            if following is None:
                if header.type == PAX_GLOBAL and not block.strip(b"\0"):
                    return None
                # The extension header itself was counted under headers; the damage begins after it.
                return self._damaged("an extension header is not followed by a tar header")
            header = following
        return self._member(header, extension, start)

    def _extend(self, header: Header, extension: Extension) -> Optional[TarProblem]:
        """Read an extension header; returns a problem if its size is invalid."""
        stop = self._at + BLOCK + padded(header.size)
        if header.size > self._max_header_bytes or stop > self._source.size:
            return self._damaged(f"an extension header of {header.size} bytes (limit {self._max_header_bytes})")
        data = self._source.read_at(self._at + BLOCK, header.size)
        reason = extension.add(header.type, data)
        self.bytes.headers += stop - self._at
        self._at = stop
        if reason:
            extension.wrong = reason
        return None

    def _member(self, header: Header, extension: Extension, start: int) -> TarEntry:
        name = extension.name if extension.name is not None else header.name
        text = name.decode("utf-8", "backslashreplace")
        size = extension.size if extension.size is not None else header.size
        is_folder = header.type in _DIRECTORIES or (header.type in b"0\0" and name.endswith(b"/"))
        stored = 0 if header.type in _WITHOUT_DATA else size
        data_offset = self._at + BLOCK
        if header.type == GNU_SPARSE:
            data_offset = self._behind_sparse_map(data_offset)
        stop = data_offset + padded(stored)
        if data_offset + stored > self._source.size:
            return self._cut_off(text, start, data_offset, stored)
        stop = min(stop, self._source.size)
        self.bytes.headers += data_offset - self._at
        self.bytes.data += stored
        self.bytes.padding += stop - data_offset - stored
        self._at = stop
        covers = stop - start
        if extension.wrong:
            return TarProblem("bad_header", start, covers, extension.wrong, text, tears=True)
        if is_folder or header.type in _LABELS:
            return TarPassed(text, "directories" if is_folder else "volume labels")
        if header.type == GNU_SPARSE or extension.is_sparse:
            return TarProblem("not_a_file", start, covers, "is stored as a sparse file; pack it without --sparse", text)
        if header.type not in _REGULAR:
            why = _NOT_FILES.get(header.type, f"is an entry of unknown type {chr(header.type)!r}")
            return TarProblem("not_a_file", start, covers, why, text)
        if not name or not is_utf8(name):
            why = "has a name that is not UTF-8" if name else "has an empty name"
            return TarProblem("name", start, covers, why, text)
        return TarMember(text, start, data_offset, stored)

    def _behind_sparse_map(self, offset: int) -> int:
        """Offset after the continuation blocks of an old GNU sparse header."""
        continues = self._source.read_at(self._at, BLOCK)[482] == 1
        while continues and offset < self._source.size:
            block = self._source.read_at(offset, BLOCK)
            continues = len(block) == BLOCK and block[504] == 1
            offset += BLOCK
        return min(offset, self._source.size)

    def _cut_off(self, name: str, start: int, data_offset: int, size: int) -> TarProblem:
        """Handle a member whose data would extend past the end of the archive.

        The member is truncated, unless valid headers follow: then the size in its header is wrong.
        """
        if self._next_sound(data_offset) is not None:
            return self._damaged(f"the header of {name!r}, which states {size} bytes, more than remain,")
        held = max(0, self._source.size - data_offset)
        self.bytes.damaged += self._source.size - self._at
        self._at, self._ended = self._source.size, True
        reason = f"the archive ends within it: {held} of its {size} bytes are present"
        return TarProblem("truncated", start, self._source.size - start, reason, name, tears=True)
