"""A part of a job that several machines share: `3/64`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_anymal.data.records import DataError

Item = TypeVar("Item")


@dataclass(frozen=True)
class PartOf:
    """One of several parts of equal size."""

    # From 1 to `of`.
    number: int
    # Number of parts.
    of: int

    @staticmethod
    def parse(text: str) -> PartOf:
        """Parse `NUMBER/PARTS`.

        Raises:
            DataError: it has another form, or there is no such part.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if not match:
            raise DataError(f"--part {text!r} is not of the form NUMBER/PARTS, for example 3/64.")
        number, of = map(int, match.groups())
        if not 1 <= number <= of:
            raise DataError(f"--part {text!r}: there is no such part. Parts are numbered from 1 to {max(of, 1)}.")
        return PartOf(number, of)

    @staticmethod
    def of_item(position: int, of: int) -> PartOf:
        """The part that takes the item at a position, counted from 0."""
        return PartOf(position % of + 1, of)

    def takes(self, position: int) -> bool:
        """Whether the part takes the item at a position, counted from 0."""
        return position % self.of == self.number - 1

    def items(self, items: Sequence[Item]) -> list[Item]:
        """The items that the part takes: each `of`-th, so that items added at the end change no other part."""
        return list(items[self.number - 1 :: self.of])

    def __str__(self) -> str:
        """As it is parsed."""
        return f"{self.number}/{self.of}"
