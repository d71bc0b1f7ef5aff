"""The grammar of text with media as codes: which token may follow which (MIO section 2.1).

    words words <picture> 16 codes </picture> words <speech> a1 a2 b1 b2 </speech>

After a begin mark come codes of that kind of media only, as many of each codebook as its section states (or any number,
the same for each codebook), and then its end mark. Outside an item there are text and begin marks, never a code or an
end mark. Generation chooses among the tokens that this grammar allows; the same grammar reads answers.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Optional, Union

import numpy as np

from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.data.discrete_vocabulary import TEXT, DiscreteCodeError


@dataclass(frozen=True)
class CodeItem:
    """A media item as codes, read from tokens."""

    # Name in model.discrete.
    name: str
    # [codebooks, codes] int64.
    codes: np.ndarray

    def file(self) -> bytes:
        """Content of the item's .npy file, as samples and prompts have it."""
        data = io.BytesIO()
        np.save(data, self.codes.astype(np.uint32))
        return data.getvalue()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodeItem) and self.name == other.name and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash((self.name, self.codes.tobytes()))


@dataclass(frozen=True)
class OpenItem:
    """An item whose end mark has not come yet."""

    # Name in model.discrete.
    name: str
    # Number of codes so far.
    codes: int = 0
    # Number of those of the first codebook.
    first: int = 0


@dataclass(frozen=True)
class AnswerContents:
    """What an answer may consist of."""

    # Whether it may have text. If not, it has at least one item.
    text: bool
    # Names in model.discrete.
    names: tuple[str, ...]
    # Tokens that end it.
    ends: tuple[int, ...]


class CodeGrammar:
    """Determines which tokens may come next, and parses sequences of tokens.

    Attributes:
        layout: ids of marks and codes, and their sections.
    """

    def __init__(self, layout: CodeLayout) -> None:
        """Nothing is computed.

        Args:
            layout: of the model.
        """
        self.layout = layout
        self._vocabulary, self._sections = layout.vocabulary, layout.sections
        names = self._vocabulary.names
        # Begin mark -> name and ids of the first codebook.
        self._begins = {self._vocabulary.begin(name): (name, self._vocabulary.codebook(name, 0)) for name in names}
        self._ends = {self._vocabulary.end(name) for name in names}

    def contents(self, modalities: Sequence[str], ends: Collection[int], room: int) -> AnswerContents:
        """What an answer may consist of.

        Args:
            modalities: "text" and names in model.discrete.
            ends: tokens that end an answer.
            room: largest number of its tokens.

        Raises:
            DiscreteCodeError: the model does not write a modality, or there is no room for an item in an answer that
                must have one.
        """
        known = (TEXT, *self._vocabulary.names)
        if unknown := [name for name in modalities if name not in known]:
            raise DiscreteCodeError(
                f"This model cannot generate {unknown[0]!r}; it can generate: {', '.join(known)}. Media must be "
                "in the model.discrete of its run."
            )
        names = tuple(name for name in modalities if name != TEXT)
        smallest = min(map(self._smallest, names), default=0)
        if TEXT not in modalities and smallest > room:
            raise DiscreteCodeError(
                f"An answer of {room} token(s) has no room for an item of {' or '.join(names)}, which has at least "
                f"{smallest} with its marks. Raise max_new_tokens, or shorten the prompt."
            )
        return AnswerContents(TEXT in modalities, names, tuple(sorted(ends)))

    def next_ids(self, item: Optional[OpenItem], contents: AnswerContents, room: int, *, empty: bool) -> list[range]:
        """Ids that may come next in an answer; there always is one.

        Args:
            item: where the answer stands; None outside an item.
            contents: what it may consist of.
            room: number of tokens that it can still have. An item that could not end within them is not begun and does
                not grow.
            empty: whether it has no tokens yet.
        """
        if item:
            return [ids for ids, after in self._options(item) if 1 + self._missing(after) <= room]
        begins = [self._vocabulary.begin(name) for name in contents.names if self._smallest(name) <= room]
        if contents.text:
            return [range(self._vocabulary.base_size), *(range(mark, mark + 1) for mark in begins)]
        return [range(mark, mark + 1) for mark in (*begins, *(() if empty else contents.ends))]

    def _smallest(self, name: str) -> int:
        """Number of tokens of the shortest item of a kind of media, with its marks."""
        return 1 + self._missing(OpenItem(name))

    def follow(self, item: Optional[OpenItem], token: int) -> Optional[OpenItem]:
        """Where a sequence stands after one more token.

        Args:
            item: where it stands before; None outside an item.
            token: id of the token.

        Raises:
            DiscreteCodeError: the token cannot come next. The message says what can.
        """
        if item is None:
            if token < self._vocabulary.base_size:
                return None
            if self._vocabulary.lookup(token).mark == "begin":
                return OpenItem(self._vocabulary.lookup(token).name)
            raise DiscreteCodeError(f"{self._vocabulary.text(token)} is outside an item, which a begin mark starts")
        for ids, after in self._options(item):
            if token in ids:
                return after
        known = self._vocabulary.base_size <= token < self._vocabulary.total_size
        written = self._vocabulary.text(token) if known else f"the text token {token}"
        wanted = " or ".join(self._described(ids) for ids, _ in self._options(item))
        raise DiscreteCodeError(
            f"{written} follows {item.codes} code(s) of an item of {item.name!r} instead of {wanted}"
        )

    def can_follow(self, item: Optional[OpenItem], token: int) -> bool:
        """Whether a token can come next; `item` as for `follow`."""
        try:
            self.follow(item, token)
        except DiscreteCodeError:
            return False
        return True

    def open_item(self, tokens: Sequence[int]) -> Optional[OpenItem]:
        """Where a sequence stands that is known to obey the grammar, found from its end; None outside an item."""
        for position in range(len(tokens) - 1, -1, -1):
            token = tokens[position]
            if token < self._vocabulary.base_size or token in self._ends:
                # Text never stands within an item.
                return None
            if token in self._begins:
                name, first = self._begins[token]
                return OpenItem(name, len(tokens) - position - 1, sum(code in first for code in tokens[position + 1 :]))
        return None

    def parts(self, tokens: Sequence[int]) -> list[Union[list[int], CodeItem]]:
        """Take a sequence apart into runs of text tokens and items.

        Raises:
            DiscreteCodeError: it breaks the grammar, or its last item is not closed. The message names the position.
        """
        content: list[Union[list[int], CodeItem]] = []
        item, start = None, 0
        for position, token in enumerate(tokens):
            before = item
            try:
                item = self.follow(before, token)
            except DiscreteCodeError as error:
                raise DiscreteCodeError(f"Token {position}: {error}.") from None
            if before is None and item is None:
                last = content[-1] if content else None
                if not isinstance(last, list):
                    content.append(last := [])
                last.append(token)
            elif before is None:
                start = position
            elif item is None:
                content.append(self.item(before.name, tokens[start + 1 : position]))
        if item is not None:
            raise DiscreteCodeError(
                f"The item of {item.name!r} that begins at token {start} is not closed: it has {item.codes} code(s) "
                f"and no {self._vocabulary.text(self._vocabulary.end(item.name))}."
            )
        return content

    def item(self, name: str, tokens: Sequence[int]) -> CodeItem:
        """The item with these codes' ids, in the order of the sequence and without marks."""
        section = self._sections[name]
        books = len(section.codebooks)
        ids = np.array(tokens, dtype=np.int64)
        codes = ids.reshape(books, -1) if section.interleaving == "sequential" else ids.reshape(-1, books).T
        first = np.array([self._vocabulary.id_of(name, book, 0) for book in range(books)])
        return CodeItem(name, codes - first[:, None])

    def _options(self, item: OpenItem) -> list[tuple[range, Optional[OpenItem]]]:
        """What may come next in an item: ids, and where the sequence stands after them."""
        section = self._sections[item.name]
        books, codes = len(section.codebooks), item.codes
        mark = self._vocabulary.end(item.name)
        end: tuple[range, Optional[OpenItem]] = (range(mark, mark + 1), None)
        sequential = section.interleaving == "sequential"
        if section.codes_per_item:
            if codes == section.codes_per_item:
                return [end]
            return [self._code(item, codes // (section.codes_per_item // books) if sequential else codes % books)]
        if not sequential:
            return [self._code(item, codes % books), *([end] if codes and codes % books == 0 else [])]
        if codes > item.first:
            return [end] if codes == books * item.first else [self._code(item, codes // item.first)]
        # In the first codebook, whose number of codes decides that of the others.
        more = self._code(item, 0)
        if not codes:
            return [more]
        return [more, end if books == 1 else self._code(item, 1)]

    def _code(self, item: OpenItem, book: int) -> tuple[range, OpenItem]:
        ids = self._vocabulary.codebook(item.name, book)
        return ids, OpenItem(item.name, item.codes + 1, item.first + (book == 0))

    def _missing(self, item: Optional[OpenItem]) -> int:
        """Minimum number of tokens that complete an item, its end mark included."""
        if item is None:
            return 0
        section = self._sections[item.name]
        books, codes = len(section.codebooks), item.codes
        if section.codes_per_item:
            return section.codes_per_item - codes + 1
        if section.interleaving != "sequential":
            return (-codes % books if codes else books) + 1
        return books * max(item.first, 1) - codes + 1

    def _described(self, ids: range) -> str:
        first = self._vocabulary.text(ids[0])
        return first if len(ids) == 1 else f"{first} to {self._vocabulary.text(ids[-1])}"
