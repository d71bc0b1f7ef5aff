"""An answer during generation: when it ends, its text, and how much of the text can already be shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

# White space and up to three characters may still be joined by the decoder (" n", " n't" -> "n't") or stripped as the
# end.
_UNSETTLED = re.compile(r"\s+\S{0,3}\Z")
# Replacement character that decoders return for an incomplete character.
_INCOMPLETE = "\ufffd"


class GrowingAnswer(Protocol):
    """An answer during generation, as those who watch it see it."""

    # Number of the prompt.
    number: int
    # Whether it has ended.
    done: bool

    def halt(self) -> None:
        """End the answer now."""

    @property
    def text(self) -> str:
        """The text so far."""

    @property
    def settled(self) -> str:
        """The beginning of the text that further tokens cannot change."""


class Answer:
    """The answer to one prompt, token by token.

    It ends with an end token, before a stop text, or when the limit on its tokens is reached.
    """

    def __init__(
        self,
        number: int,
        decode: Callable[[Sequence[int]], str],
        ends: Collection[int],
        stops: Sequence[str],
        room: int,
    ):
        """Start an empty answer.

        Args:
            number: number of the prompt.
            decode: converts token ids to text.
            ends: tokens that end an answer.
            stops: texts that end an answer.
            room: largest number of tokens.
        """
        self.number = number
        # Without the end token.
        self.tokens: list[int] = []
        self.done = False
        self.room = room
        self._decode, self._ends, self._stops = decode, ends, stops

    def add(self, token: int) -> None:
        """Append the next token; has no effect once the answer is done."""
        if self.done:
            return
        if token in self._ends:
            self.done = True
            return
        self.tokens.append(token)
        self.done = len(self.tokens) >= self.room or (bool(self._stops) and self._stop(self._whole) is not None)

    @property
    def cut_off(self) -> bool:
        """Whether the answer is done only because of the limit on its tokens."""
        return self.done and len(self.tokens) >= self.room and self._stop(self._whole) is None

    def halt(self) -> None:
        """End the answer now."""
        self.done = True

    @property
    def text(self) -> str:
        """The text so far, up to a stop text."""
        whole = self._whole
        return whole[: self._stop(whole)]

    @property
    def settled(self) -> str:
        """The beginning of the text that further tokens cannot change: whole characters, no prefix of a stop text."""
        text = self.text
        if self.done:
            return text
        text = text.rstrip(_INCOMPLETE)
        begun = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return _UNSETTLED.sub("", text[: len(text) - max(begun, default=0)])

    @property
    def _whole(self) -> str:
        return self._decode(self.tokens)

    def _stop(self, text: str) -> int | None:
        """Position at which the first stop text begins."""
        return min((position for stop in self._stops if (position := text.find(stop)) >= 0), default=None)


class Stream:
    """Writes an answer incrementally; the concatenated output is its text without surrounding white space."""

    def __init__(self, write: Callable[[str], object]):
        self._write, self._written = write, 0

    def __call__(self, answer: GrowingAnswer) -> None:
        """Write the text that has settled since the last call."""
        text = answer.settled.strip()
        if new := text[self._written :]:
            self._write(new)
            self._written = len(text)
