"""Reading a tar archive so that every byte of it is accounted for.

Python's `tarfile` takes a damaged header for the end of the archive and follows sizes that a header merely claims. This
reader checks each header before it acts on it, names what it cannot use with its offset, and looks for the next sound
header behind a damaged place. It reads the formats that occur in practice: v7, POSIX ustar and pax, and GNU.

Layout (POSIX.1-2017, pax, "ustar Interchange Format"): blocks of 512 bytes. A header block precedes each member's data,
which is padded to whole blocks; two blocks of zeros end the archive, and writers pad the file to whole records with
further zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

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
# Entries without data behind their header, whatever size it states.
_WITHOUT_DATA = b"123456"
# What a damaged place is searched for sound headers in at a time.
_SCAN_BYTES = 256 * BLOCK
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


@dataclass(frozen=True)
class TarMember:
    """A regular file in an archive. Offsets and sizes are in bytes."""

    name: str
    # Of its first header block, extension headers included.
    header_offset: int
    offset: int
    size: int


@dataclass(frozen=True)
class TarProblem:
    """Something in an archive that is not a readable file, with the bytes that it covers."""

    # One of the ledger's codes (data/left_out.py).
    code: str
    offset: int
    length: int
    reason: str
    # The member's name, if it is known.
    name: str = ""
    # Whether members may be missing here, so that the samples on either side are possibly incomplete.
    tears: bool = False


@dataclass(frozen=True)
class TarPassed:
    """What belongs to an archive without being a file: a directory, a volume label."""

    name: str
    what: str


TarEntry = TarMember | TarProblem | TarPassed


class TarError(ValueError):
    """A file that is not an uncompressed tar archive. The message says what it is, or why it cannot be one."""


@dataclass
class ByteCounts:
    """What each byte of an archive was taken for; they add up to its size once it has been walked through."""

    headers: int = 0
    data: int = 0
    padding: int = 0
    end: int = 0
    damaged: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.headers + self.data + self.padding + self.end + self.damaged


class TarWalk:
    """One pass over an archive.

    Args:
        source: the archive.
        max_header_bytes: longest extension header (long names, pax records) that is read.
    """

    def __init__(self, source: ByteSource, max_header_bytes: int):
        self._source, self._max_header_bytes = source, max_header_bytes
        self.bytes = ByteCounts()
        self._at = 0
        self._ended = False

    def __iter__(self) -> Iterator[TarEntry]:
        """Members and everything else, in the order of the file.

        Raises:
            TarError: it is empty, compressed, or has no sound header anywhere.
            OSError: it cannot be read.
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
            yield from self._entry(header)
        if not self._ended:
            yield TarProblem(
                "no_end",
                size,
                0,
                "the archive has no end-of-archive blocks: writing it was interrupted, or it was cut off",
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
        """A run of zero blocks: the end of the archive, the seam of two joined ones, or a hole."""
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
                "end-of-archive blocks are followed by another archive, which is read too. If nobody joined archives "
                "here, members were overwritten with zeros",
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
        """Account for everything from here to the next sound header as damaged, and continue there."""
        start = self._at
        found = self._stated_next(start)
        if found is None:
            found = self._next_sound(start + BLOCK)
        stop = self._source.size if found is None else found
        self._at, self._ended = stop, found is None
        self.bytes.damaged += stop - start
        behind = "nothing readable follows" if found is None else f"reading continues at offset {stop}"
        return TarProblem("damaged", start, stop - start, f"{what} at offset {start}; {behind}", tears=True)

    def _stated_next(self, start: int) -> Optional[int]:
        """Offset of the header behind the data that a damaged header states, if that header is sound.

        So an archive inside the archive is passed over when only the checksum or the name before it is damaged.
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
        """Offset of the first sound header at or behind `start`."""
        for at in range(start, self._source.size, _SCAN_BYTES):
            chunk = self._source.read_at(at, _SCAN_BYTES)
            for place in range(0, len(chunk), BLOCK):
                block = chunk[place : place + BLOCK]
                # Most blocks of media are told apart by their checksum field alone.
                if block[148:156].strip(b" \0").isdigit() and parse_header(block) is not None:
                    return at + place
        return None

    def _entry(self, header: Header) -> Iterator[TarEntry]:
        """A member with the extension headers before it."""
        start = self._at
        extension = Extension()
        while True:
            if header.type in (GNU_LONG_NAME, GNU_LONG_LINK, PAX_GLOBAL) or header.type in PAX_NEXT:
                problem = self._extend(header, extension)
            else:
                yield from self._member(header, extension, start)
                return
            if problem is not None:
                yield problem
                return
            block = self._source.read_at(self._at, BLOCK)
            following = parse_header(block)
            if following is None:
                if header.type == PAX_GLOBAL and not block.strip(b"\0"):
                    return
                # Its bytes are counted as headers; what follows it is the damage.
                yield self._damaged("an extension header is not followed by a tar header")
                return
            header = following

    def _extend(self, header: Header, extension: Extension) -> Optional[TarProblem]:
        """Read an extension header's content; returns what is wrong with it."""
        stop = self._at + BLOCK + padded(header.size)
        if header.size > self._max_header_bytes or stop > self._source.size:
            return self._damaged(f"an extension header of {header.size} bytes (limit {self._max_header_bytes})")
        data = self._source.read_at(self._at + BLOCK, header.size)
        why = extension.add(header.type, data)
        self.bytes.headers += stop - self._at
        self._at = stop
        if why:
            extension.wrong = why
        return None

    def _member(self, header: Header, extension: Extension, start: int) -> Iterator[TarEntry]:
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
            yield self._cut_off(text, start, data_offset, stored)
            return
        stop = min(stop, self._source.size)
        self.bytes.headers += data_offset - self._at
        self.bytes.data += stored
        self.bytes.padding += stop - data_offset - stored
        self._at = stop
        covers = stop - start
        if extension.wrong:
            yield TarProblem("bad_header", start, covers, extension.wrong, text, tears=True)
        elif is_folder or header.type in _LABELS:
            yield TarPassed(text, "directories" if is_folder else "volume labels")
        elif header.type == GNU_SPARSE or extension.is_sparse:
            yield TarProblem("not_a_file", start, covers, "is stored sparsely; pack it without --sparse", text)
        elif header.type not in _REGULAR:
            why = _NOT_FILES.get(header.type, f"is an entry of the unknown type {chr(header.type)!r}")
            yield TarProblem("not_a_file", start, covers, why, text)
        elif not name or not is_utf8(name):
            why = "has a name that is not UTF-8" if name else "has an empty name"
            yield TarProblem("name", start, covers, why, text)
        else:
            yield TarMember(text, start, data_offset, stored)

    def _behind_sparse_map(self, offset: int) -> int:
        """Offset behind the blocks that continue an old GNU sparse header."""
        continues = self._source.read_at(self._at, BLOCK)[482] == 1
        while continues and offset < self._source.size:
            block = self._source.read_at(offset, BLOCK)
            continues = len(block) == BLOCK and block[504] == 1
            offset += BLOCK
        return min(offset, self._source.size)

    def _cut_off(self, name: str, start: int, data_offset: int, size: int) -> TarProblem:
        """A member whose data would end behind the archive: cut off, unless other members follow its header."""
        if self._next_sound(data_offset) is not None:
            return self._damaged(f"the header of {name!r}, which states {size} bytes, more than follow,")
        held = max(0, self._source.size - data_offset)
        self.bytes.damaged += self._source.size - self._at
        self._at, self._ended = self._source.size, True
        reason = f"the archive ends within it: {held} of its {size} bytes are there"
        return TarProblem("truncated", start, self._source.size - start, reason, name, tears=True)
