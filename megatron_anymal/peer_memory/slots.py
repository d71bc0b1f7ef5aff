"""Two alternating slots for a rank's state, in a file in memory that outlives the rank.

A slot is valid only while its header matches its own checksum; the header is erased before the slot is overwritten and
written after the data. So whenever a rank is killed, at least one of its slots is complete.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Optional

SLOTS = 2
# Bytes of a header; data begins after the headers.
_HEADER = 4096
_START = SLOTS * _HEADER
# Length and CRC-32 of the JSON text that follows.
_PREFIX = struct.Struct("<II")


@dataclass(frozen=True)
class Copy:
    """One rank's state after a step."""

    # Rank in the job.
    rank: int
    # Updates made so far.
    step: int
    # Hash of everything that a run must have in common with the one that made the copy.
    identity: str
    # Number of bytes; a slot may be larger.
    size: int
    # CRC-32 of the bytes; None until it is known.
    checksum: Optional[int]
    # Update counts of the optimizer's parameter groups.
    counts: tuple[int, ...] = ()


class SlotFile:
    """A file with two slots; several processes may open it.

    Args:
        path: an existing file.
        size: bytes of a slot; the file is resized, and its contents are dropped, if they are of another size. None:
            open it as it is.

    Raises:
        OSError: the file cannot be opened, or there is not enough memory.
    """

    def __init__(self, path: str, size: Optional[int] = None) -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            if size is not None and os.fstat(descriptor).st_size != _file_size(size):
                os.ftruncate(descriptor, 0)
                # Reserves the memory, instead of a SIGBUS at the first access.
                os.posix_fallocate(descriptor, 0, _file_size(size))
            length = os.fstat(descriptor).st_size
            self.size = max(0, length - _START) // SLOTS
            self._map = mmap.mmap(descriptor, length) if length else None
        finally:
            os.close(descriptor)

    def copies(self) -> dict[int, Copy]:
        """Slot -> the copy that it holds; slots without a complete copy are left out. The data is not checked."""
        headers = {slot: self._read_header(slot) for slot in range(SLOTS if self._map else 0)}
        return {slot: copy for slot, copy in headers.items() if copy is not None}

    def data(self, slot: int) -> memoryview:
        """The bytes of a slot, writable."""
        assert self._map is not None
        begin = _START + slot * self.size
        return memoryview(self._map)[begin : begin + self.size]

    def begin(self) -> int:
        """Erase the header of the slot to write next, which is not that of the newest step, and return its number."""
        copies = self.copies()
        slot = min(range(SLOTS), key=lambda number: copies[number].step if number in copies else -1)
        self._erase(slot)
        return slot

    def commit(self, slot: int, copy: Copy) -> None:
        """Mark a slot as complete, or replace its description.

        Raises:
            ValueError: the copy's description does not fit into a header.
        """
        text = json.dumps(asdict(copy)).encode()
        if len(text) > _HEADER - _PREFIX.size:
            raise ValueError(f"the description of the copy takes {len(text)} bytes.")
        assert self._map is not None
        header = _PREFIX.pack(len(text), zlib.crc32(text)) + text
        # One write instead of two: a process that is killed between them would leave no valid header.
        self._map[slot * _HEADER : slot * _HEADER + len(header)] = header

    def clear(self) -> None:
        """Erase both headers."""
        for slot in range(SLOTS if self._map else 0):
            self._erase(slot)

    def _erase(self, slot: int) -> None:
        assert self._map is not None
        begin = slot * _HEADER
        self._map[begin : begin + _PREFIX.size] = bytes(_PREFIX.size)

    def _read_header(self, slot: int) -> Optional[Copy]:
        assert self._map is not None
        begin = slot * _HEADER
        length, checksum = _PREFIX.unpack(self._map[begin : begin + _PREFIX.size])
        text = self._map[begin + _PREFIX.size : begin + _PREFIX.size + length]
        if not length or zlib.crc32(text) != checksum:
            return None
        return parse_copy(json.loads(text))


def parse_copy(fields: dict[str, object]) -> Copy:
    """A copy's description from its JSON form."""
    copy = Copy(**fields)  # type: ignore[arg-type]
    return Copy(copy.rank, copy.step, copy.identity, copy.size, copy.checksum, tuple(copy.counts))


def _file_size(size: int) -> int:
    return _START + SLOTS * size
