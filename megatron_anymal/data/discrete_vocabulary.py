"""Vocabulary entries of discrete media: begin and end marks, and the codes of codebooks.

They follow the Llama's own vocabulary in the order of `model.discrete`. Each kind of media has its begin mark, its end
mark, and then the codes of its codebooks, one codebook after the other:

    base_size + 0                    <image>
    base_size + 1                    </image>
    base_size + 2 ...                codes 0, 1, ... of the first codebook of "image"
    ...                              codes of its further codebooks; then the next kind of media, its marks first

Appending a kind of media, or a codebook to the last one, therefore changes no earlier id.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Optional

from megatron_anymal.config import DiscreteConfig

# What an answer consists of besides kinds of media; no kind has this name.
TEXT = "text"


class DiscreteCodeError(ValueError):
    """A code, codebook, kind of media or id that the vocabulary does not have. The message names it and the range."""


@dataclass(frozen=True)
class DiscreteToken:
    """What an id stands for: a code if `codebook` is set, and otherwise a mark.

    Attributes:
        name: the kind of media.
        mark: "begin" or "end"; empty for a code.
        codebook: index of the codebook; None for a mark.
        code: index within the codebook; None for a mark.
    """

    name: str
    mark: str = ""
    codebook: Optional[int] = None
    code: Optional[int] = None


class DiscreteVocabulary:
    """Ids of the marks and codes of all kinds of discrete media.

    Attributes:
        base_size: size of the Llama's own vocabulary; ids below it are text.
        added: number of marks and codes.
        total_size: base_size + added.
        names: the kinds of media, in the order of their ids.
    """

    def __init__(self, base_size: int, sections: Mapping[str, DiscreteConfig]) -> None:
        """Lay out the ids.

        Args:
            base_size: `vocab_size` of the Llama's configuration, without marks, codes and padding.
            sections: `model.discrete`, validated.
        """
        self.base_size = base_size
        self.names = tuple(sections)
        self._marks: dict[str, tuple[str, str]] = {}
        self._codebooks: dict[str, list[range]] = {}
        self._sections: list[range] = []
        first = base_size
        for name, section in sections.items():
            self._marks[name] = (section.begin or f"<{name}>", section.end or f"</{name}>")
            start, books = first + 2, []
            for size in section.codebooks:
                books.append(range(start, start + size))
                start += size
            self._codebooks[name] = books
            self._sections.append(range(first, start))
            first = start
        self.total_size = first
        self.added = first - base_size

    def ids(self, name: str) -> range:
        """All ids of a kind of media: its marks and codes.

        Raises:
            DiscreteCodeError: there is no such kind.
        """
        self._books(name)
        return self._sections[self.names.index(name)]

    def begin(self, name: str) -> int:
        """Id of the mark before an item.

        Raises:
            DiscreteCodeError: there is no such kind of media.
        """
        return self.ids(name)[0]

    def end(self, name: str) -> int:
        """Id of the mark after an item.

        Raises:
            DiscreteCodeError: there is no such kind of media.
        """
        return self.ids(name)[1]

    def codebook(self, name: str, codebook: int) -> range:
        """Ids of a codebook's codes.

        Raises:
            DiscreteCodeError: there is no such kind of media or codebook.
        """
        books = self._books(name)
        if not 0 <= codebook < len(books):
            raise DiscreteCodeError(f"{name!r} has no codebook {codebook}; it has {len(books)}, counted from 0.")
        return books[codebook]

    def codebooks(self, name: str) -> int:
        """Number of codebooks of a kind of media.

        Raises:
            DiscreteCodeError: there is no such kind.
        """
        return len(self._books(name))

    def id_of(self, name: str, codebook: int, code: int) -> int:
        """Id of a code.

        Raises:
            DiscreteCodeError: the code is outside its codebook, or there is no such kind of media or codebook.
        """
        ids = self.codebook(name, codebook)
        if not 0 <= code < len(ids):
            raise DiscreteCodeError(
                f"code {code} of {name!r} is outside its codebook {codebook}, which has the codes 0 to {len(ids) - 1}."
            )
        return ids[code]

    def lookup(self, token: int) -> DiscreteToken:
        """What an id stands for.

        Raises:
            DiscreteCodeError: the id is text, or beyond the vocabulary.
        """
        if not self.base_size <= token < self.total_size:
            kind = "belongs to the text" if 0 <= token < self.base_size else "is outside the vocabulary"
            raise DiscreteCodeError(
                f"token {token} {kind}; marks and codes are {self.base_size} to {self.total_size - 1}."
            )
        number = bisect_right([ids.start for ids in self._sections], token) - 1
        name, offset = self.names[number], token - self._sections[number].start
        if offset < 2:
            return DiscreteToken(name, mark=("begin", "end")[offset])
        books = self._codebooks[name]
        index = bisect_right([ids.start for ids in books], token) - 1
        return DiscreteToken(name, codebook=index, code=token - books[index].start)

    def text(self, token: int) -> str:
        """Written form of an id: the mark, or <NAME:CODEBOOK:CODE>.

        Raises:
            DiscreteCodeError: the id is text, or beyond the vocabulary.
        """
        entry = self.lookup(token)
        if entry.mark:
            return self._marks[entry.name][entry.mark == "end"]
        return f"<{entry.name}:{entry.codebook}:{entry.code}>"

    def texts(self) -> Iterator[str]:
        """Written forms of all marks and codes, in the order of their ids."""
        return map(self.text, range(self.base_size, self.total_size))

    @property
    def layout(self) -> list[tuple[str, tuple[str, str], list[int]]]:
        """Name, marks and codebook sizes of each kind of media: what decides which id stands for what."""
        return [(name, self._marks[name], [len(ids) for ids in self._codebooks[name]]) for name in self.names]

    def _books(self, name: str) -> list[range]:
        if name not in self._codebooks:
            raise DiscreteCodeError(
                f"{name!r} is not a kind of discrete media; model.discrete has {', '.join(self.names) or 'none'}."
            )
        return self._codebooks[name]
