"""Keeps an answer to the grammar of media as codes while it is generated."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Optional

from megatron_anymal.config import ConfigError
from megatron_anymal.data.code_grammar import CodeGrammar, CodeItem, OpenItem
from megatron_anymal.data.discrete_vocabulary import TEXT, DiscreteCodeError
from megatron_anymal.generation.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor


class CodeGuide:
    """One answer's place in the grammar: which tokens may come next, and how they are chosen."""

    def __init__(self, grammar: CodeGrammar, sampling: Sampling, ends: Collection[int], room: int):
        """Start an empty answer.

        Args:
            grammar: of the model.
            sampling: settings of the answer.
            ends: tokens that end an answer.
            room: largest number of tokens.

        Raises:
            ConfigError: the model does not write what the answer is to consist of, or there is no room for an item.
        """
        try:
            self._contents = grammar.contents([*sampling.modalities, *sampling.codes], ends, room)
            self._contents = grammar.contents(sampling.modalities, ends, room)
        except DiscreteCodeError as error:
            raise ConfigError(str(error)) from None
        self._grammar, self._sampling, self._room = grammar, sampling, room
        self._of_codes = {
            name: sampling.of_codes(name, fixed=bool(grammar.layout.sections[name].codes_per_item))
            for name in self._contents.names
        }
        self._item: Optional[OpenItem] = None
        # Ids of the open item's codes.
        self._ids: list[int] = []
        self._empty = True
        # Whether the likeliest token obeyed the grammar at every position so far.
        self.grammatical = True

    @property
    def inside(self) -> bool:
        """Whether the next token belongs to an item that has begun."""
        return self._item is not None

    @property
    def sampling(self) -> Sampling:
        """Settings for the next token."""
        return self._of_codes[self._item.name] if self._item else self._sampling

    def observe(self, likeliest: int) -> None:
        """Take note of the token that the model gives the largest logit."""
        self.grammatical = self.grammatical and self._grammar.can_follow(self._item, likeliest)

    def masked(self, logits: Tensor) -> Tensor:
        """Logits [V] with minus infinity for tokens that must not come next."""
        kept = logits.new_full(logits.shape, float("-inf"))
        for ids in self._grammar.next_ids(self._item, self._contents, self._room, empty=self._empty):
            kept[ids.start : ids.stop] = logits[ids.start : ids.stop]
        return kept

    def add(self, token: int) -> Optional[CodeItem]:
        """Take the next token; return the item that it closes."""
        before, self._item = self._item, self._grammar.follow(self._item, token)
        self._room, self._empty = self._room - 1, False
        if before is None:
            self._ids = []
            return None
        if self._item is not None:
            self._ids.append(token)
            return None
        return self._grammar.item(before.name, self._ids)


def guide_of(
    grammar: Optional[CodeGrammar], sampling: Sampling, ends: Collection[int], room: int
) -> Optional[CodeGuide]:
    """The guide of an answer; None for a model whose vocabulary has no codes.

    Args:
        grammar: of the model; None if it has no codes.
        sampling: settings of the answer.
        ends: tokens that end an answer.
        room: largest number of tokens.

    Raises:
        ConfigError: as `CodeGuide`.
    """
    if grammar:
        return CodeGuide(grammar, sampling, ends, room)
    if asked := [name for name in (*sampling.modalities, *sampling.codes) if name != TEXT]:
        raise ConfigError(f"{asked[0]!r} cannot be written by this model, whose run has no model.discrete.")
    return None
