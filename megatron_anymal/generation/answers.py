"""An answer while it grows: when it ends, its text, and what of the text can be shown already."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

# A blank and up to three characters may still be joined by the decoder (" n", " n't" -> "n't") or cut off as the end.
_UNSETTLED = re.compile(r"\s+\S{0,3}\Z")
# What decoders give for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"


class Answer:
    """The answer to one prompt, token by token.

    It ends with an end token, before a stop text, or when there is no room for more tokens.
    """

    def __init__(
        self,
        number: int,
        decode: Callable[[Sequence[int]], str],
        ends: Collection[int],
        stops: Sequence[str],
        room: int,
    ):
        """`number` is the prompt's; `decode` makes text of ids, `ends` are the tokens that end an answer."""
        self.number = number
        # Without the token that ended it.
        self.tokens: list[int] = []
        self.done = False
        self._decode, self._ends, self._stops, self._room = decode, ends, stops, room

    def add(self, token: int) -> None:
        """Take the next token; nothing once it is done."""
        if self.done:
            return
        if token in self._ends:
            self.done = True
            return
        self.tokens.append(token)
        self.done = len(self.tokens) >= self._room or (bool(self._stops) and self._stop(self._whole) is not None)

    @property
    def text(self) -> str:
        """What is answered so far, up to a stop text."""
        whole = self._whole
        return whole[: self._stop(whole)]

    @property
    def settled(self) -> str:
        """The beginning of the text that further tokens leave as it is: whole characters, no part of a stop text."""
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
        """Where the first stop text begins."""
        return min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=None)


class Stream:
    """Writes an answer piece by piece; together the pieces are its text without white space around it."""

    def __init__(self, write: Callable[[str], object]):
        self._write, self._written = write, 0

    def __call__(self, answer: Answer) -> None:
        """Write what has settled since the last call."""
        text = answer.settled.strip()
        if piece := text[self._written :]:
            self._write(piece)
            self._written = len(text)
