"""An answer during generation: when it ends, its text and media, and how much of the text can already be shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Optional, Protocol, Union

from megatron_anymal.data.code_grammar import CodeItem
from megatron_anymal.generation.code_guide import CodeGuide

# White space and up to three characters may still be joined by the decoder (" n", " n't" -> "n't") or stripped as the
# end.
_UNSETTLED = re.compile(r"\s+\S{0,3}\Z")
# Replacement character that decoders return for an incomplete character.
_INCOMPLETE = "\ufffd"


# A part of an answer: text, or media as codes.
ReplyPart = Union[str, CodeItem]


@dataclass(frozen=True)
class Reply:
    """A complete answer."""

    # The text; an item stands in it as its name and number in the answer, such as [picture 1].
    text: str
    # Texts and items, in order.
    parts: tuple[ReplyPart, ...]
    # Whether the likeliest token obeyed the grammar of codes at every position, even before it was enforced.
    grammatical: bool = True

    @staticmethod
    def of_parts(parts: Iterable[ReplyPart], *, grammatical: bool = True) -> Reply:
        """An answer of texts and items; empty texts are left out."""
        kept = tuple(part for part in parts if part != "")
        text, items = "", 0
        for part in kept:
            items += isinstance(part, CodeItem)
            text += part if isinstance(part, str) else f"[{part.name or 'codes'} {items}]"
        return Reply(text, kept, grammatical)

    @property
    def items(self) -> list[CodeItem]:
        """The media."""
        return [part for part in self.parts if isinstance(part, CodeItem)]


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
    def reply(self) -> Reply:
        """The answer with its media, as far as it has come."""

    @property
    def settled(self) -> str:
        """The beginning of the text that further tokens cannot change."""


class Answer:
    """The answer to one prompt, token by token.

    It ends with an end token, before a stop text, or when the limit on its tokens is reached. Media in it are complete
    items; an item during which it is halted is left out.
    """

    def __init__(
        self,
        number: int,
        decode: Callable[[Sequence[int]], str],
        ends: Collection[int],
        stops: Sequence[str],
        room: int,
        guide: Optional[CodeGuide] = None,
    ):
        """Start an empty answer.

        Args:
            number: number of the prompt.
            decode: converts token ids to text.
            ends: tokens that end an answer.
            stops: texts that end an answer.
            room: largest number of tokens.
            guide: keeps it to the grammar of media as codes; None if the model's vocabulary has none.
        """
        self.number = number
        # Without the end token.
        self.tokens: list[int] = []
        self.done = False
        self.room, self.guide = room, guide
        self._decode, self._ends, self._stops = decode, ends, stops
        # Everything up to the end of the last item, its text, and the text tokens after it.
        self._parts: list[ReplyPart] = []
        self._before = ""
        self._run: list[int] = []

    def add(self, token: int) -> None:
        """Append the next token; has no effect once the answer is done."""
        if self.done:
            return
        if token in self._ends:
            self.done = True
            return
        self.tokens.append(token)
        inside = self.guide is not None and self.guide.inside
        if self.guide and (item := self.guide.add(token)):
            self._close(item)
        elif not inside and not (self.guide and self.guide.inside):
            self._run.append(token)
        self.done = len(self.tokens) >= self.room or (bool(self._stops) and self._stop(self._last) is not None)

    def _close(self, item: CodeItem) -> None:
        last = self._last
        self._parts += [last, item]
        self._before, self._run = Reply.of_parts(self._parts).text, []

    @property
    def cut_off(self) -> bool:
        """Whether the answer is done only because of the limit on its tokens."""
        return self.done and len(self.tokens) >= self.room and self._stop(self._last) is None

    def halt(self) -> None:
        """End the answer now."""
        self.done = True

    @property
    def text(self) -> str:
        """The text so far, up to a stop text."""
        last = self._last
        return self._before + last[: self._stop(last)]

    @property
    def reply(self) -> Reply:
        """The answer with its media, as far as it has come."""
        last = self._last
        grammatical = self.guide is None or self.guide.grammatical
        return Reply.of_parts([*self._parts, last[: self._stop(last)]], grammatical=grammatical)

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
    def _last(self) -> str:
        """The text after the last item."""
        return self._decode(self._run)

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
