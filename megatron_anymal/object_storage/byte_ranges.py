"""Byte ranges of objects, and their combination into few requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class ByteRange:
    """The bytes [start, stop) of an object."""

    # Path of the object.
    path: str
    # First byte.
    start: int
    # Byte after the last one.
    stop: int


def coalesce(ranges: Iterable[ByteRange], gap: int) -> list[tuple[ByteRange, list[ByteRange]]]:
    """Ranges that cover the given ones; neighbours in an object that are at most `gap` bytes apart share one.

    Returns:
        Each covering range with the given ranges inside it, sorted.
    """
    joined: list[tuple[ByteRange, list[ByteRange]]] = []
    for one in sorted(set(ranges)):
        if joined:
            last, inside = joined[-1]
            if one.path == last.path and one.start - last.stop <= gap:
                joined[-1] = ByteRange(last.path, last.start, max(last.stop, one.stop)), [*inside, one]
                continue
        joined.append((one, [one]))
    return joined


def runs(numbers: Iterable[int]) -> list[range]:
    """Ascending numbers as ranges of consecutive ones."""
    ranges: list[range] = []
    for number in numbers:
        if ranges and number == ranges[-1].stop:
            ranges[-1] = range(ranges[-1].start, number + 1)
        else:
            ranges.append(range(number, number + 1))
    return ranges
