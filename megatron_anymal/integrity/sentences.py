"""Sentences of a text that grows: when one is finished, and a gate that lets it out only after a check.

Sentences end as in Unicode's Standard Annex 29, whose character classes cover all scripts, reduced to the rules that
need one character behind the end: after a mark that always ends one (`!`, `?`, the ideographic full stop, the danda);
after a full stop with white space behind it, unless a lower-case letter follows; and at line breaks. Text in which none
of these comes, as in Thai, or a model that never ends its sentence, is checked in stretches that overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

import regex

from megatron_anymal.generation.rejection import Rejection

# The character behind the end must have come: it may belong to the sentence ("3.14", "e.g. this", "Hm!?").
_END = regex.compile(
    r"""
    (?:
        \p{SB=STerm}[\p{SB=STerm}\p{SB=ATerm}]*+\p{SB=Close}*+\p{SB=Sp}*+
      | \p{SB=ATerm}[\p{SB=STerm}\p{SB=ATerm}]*+\p{SB=Close}*+\p{SB=Sp}++(?!\p{SB=Lower})
    )
    (?=[^\p{SB=SContinue}\p{SB=Sep}\p{SB=CR}\p{SB=LF}])
    | [\p{SB=Sep}\p{SB=CR}\p{SB=LF}]++(?=.)
    """,
    regex.VERBOSE | regex.DOTALL,
)


@dataclass(frozen=True)
class Sentence:
    """A finished sentence, or a stretch of one that is too long."""

    # The text that was let out before.
    before: str
    # What is to be checked.
    text: str
    # How much of `text` may be shown if it passes; the rest is checked again with what follows.
    shown: int


class Sentences:
    """Splits a text into sentences while it grows. How it arrives in pieces makes no difference."""

    def __init__(self, longest: int, overlap: int):
        """Start an empty text.

        Args:
            longest: characters after which a sentence that has not ended is checked.
            overlap: characters at the end of such a stretch that are checked again with what follows; below `longest`.
        """
        self._longest, self._overlap = longest, overlap
        self._before = self._pending = ""

    def add(self, piece: str) -> Iterator[Sentence]:
        """Append text and yield what it finishes."""
        self._pending += piece
        while True:
            end = _END.search(self._pending, 0, self._longest + 1)
            if end:
                yield self._taken(end.end(), end.end())
            elif len(self._pending) > self._longest:
                yield self._taken(self._longest, self._longest - self._overlap)
            else:
                return

    def finish(self) -> Iterator[Sentence]:
        """Yield the rest of the text, if there is any."""
        if self._pending:
            yield self._taken(len(self._pending), len(self._pending))

    def _taken(self, checked: int, shown: int) -> Sentence:
        sentence = Sentence(self._before, self._pending[:checked], shown)
        self._before, self._pending = self._before + self._pending[:shown], self._pending[shown:]
        return sentence


class SentenceGate:
    """Holds text back until the sentence that it belongs to has passed a check.

    After the first sentence that does not pass, nothing comes out any more.
    """

    def __init__(self, check: Callable[[Sentence], Optional[Rejection]], longest: int, overlap: int):
        """Start an empty text.

        Args:
            check: returns why a sentence is rejected, or None.
            longest: characters after which a sentence that has not ended is checked.
            overlap: characters of such a stretch that are held back and checked again with what follows.
        """
        self._check, self._sentences = check, Sentences(longest, overlap)
        # The text that may be shown.
        self.released = ""
        # Why the text was rejected; None if it was not.
        self.rejection: Optional[Rejection] = None

    def add(self, piece: str) -> str:
        """Append text; return what may be shown now."""
        return self._passed(self._sentences.add(piece))

    def finish(self) -> str:
        """The text is complete: return the rest of it that may be shown."""
        return self._passed(self._sentences.finish())

    def _passed(self, sentences: Iterator[Sentence]) -> str:
        new = ""
        while self.rejection is None and (sentence := next(sentences, None)):
            self.rejection = self._check(sentence)
            if self.rejection is None:
                new += sentence.text[: sentence.shown]
        self.released += new
        return new
