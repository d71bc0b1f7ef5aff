"""Parsing and validation of tar header blocks: v7, POSIX ustar and pax, and GNU.

POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import zlib
from typing import NamedTuple, Optional

BLOCK = 512
GNU_LONG_NAME, GNU_LONG_LINK, GNU_SPARSE = ord("L"), ord("K"), ord("S")
PAX_NEXT, PAX_GLOBAL = b"xX", ord("g")


class Header(NamedTuple):
    """A valid header block."""

    # Path of the member, with its prefix; not yet checked to be UTF-8.
    name: bytes
    # Size of the data in bytes, without padding.
    size: int
    # Type flag, as a byte value.
    type: int


class Extension:
    """Properties of a member from the extension headers before it."""

    def __init__(self) -> None:
        self.name: Optional[bytes] = None
        self.size: Optional[int] = None
        self.is_sparse = False
        self.wrong = ""

    def add(self, kind: int, data: bytes) -> str:
        """Apply the content of an extension header; returns what is wrong with it, or ""."""
        if kind == GNU_LONG_NAME:
            self.name = data.rstrip(b"\0")
            return "" if self.name and b"\0" not in self.name else "its long name is damaged"
        if kind == GNU_LONG_LINK:
            return ""
        records = _pax_records(data)
        if records is None:
            return "its pax header is damaged"
        if kind == PAX_GLOBAL:
            meaning = [key for key in records if key in (b"path", b"size") or key.startswith(b"GNU.sparse.")]
            return f"a global pax header sets {meaning[0].decode()!r} for all members" if meaning else ""
        self.is_sparse |= any(key.startswith(b"GNU.sparse.") for key in records)
        self.name = records.get(b"path", self.name)
        if b"size" in records:
            if not records[b"size"].isdigit() or len(records[b"size"]) > 19:
                return "its pax header states a size that is not a number"
            self.size = int(records[b"size"])
        return ""


def _pax_records(data: bytes) -> Optional[dict[bytes, bytes]]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header; None if they are malformed."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        if space < 0 or not data[at:space].isdigit():
            return None
        stop = at + int(data[at:space])
        record = data[space + 1 : stop]
        if stop > len(data) or stop <= space or not record.endswith(b"\n") or b"=" not in record:
            return None
        key, _, value = record[:-1].partition(b"=")
        records[key] = value
        at = stop
    return records


def parse_header(block: bytes) -> Optional[Header]:
    """Parse a header block; None if it is invalid: too short, a wrong checksum, or malformed fields."""
    if len(block) < BLOCK:
        return None
    stated = _number(block[148:156])
    if stated is None:
        return None
    total = _sum(block) - sum(block[148:156]) + 8 * 32
    # Some old writers summed signed characters.
    if stated != total and stated != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    name = block[:100].partition(b"\0")[0]
    # The GNU format has other fields in place of the prefix.
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return Header(name, size, block[156])


def _sum(block: bytes) -> int:
    """Sum of the bytes of a block: the low half of Adler-32 is 1 + the sum, below its modulus for half a block."""
    return (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2


def stated_size(block: bytes) -> Optional[int]:
    """The size field of a damaged block that has the magic of a tar header; None without the magic or a valid size."""
    return _number(block[124:136]) if block[257:262] == b"ustar" else None


def _number(field: bytes) -> Optional[int]:
    """Parse an octal number or GNU's base-256 encoding; None if it is invalid or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def padded(size: int) -> int:
    """Bytes that a member's data occupies: `size` bytes, rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def is_utf8(name: bytes) -> bool:
    """Whether the name is valid UTF-8."""
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
