"""The grammar of media as codes for transformers' `generate`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Optional

import torch
from torch import Tensor
from transformers import LogitsProcessor

from megatron_anymal.data.code_grammar import AnswerContents, CodeGrammar


class CodeLogitsProcessor(LogitsProcessor):
    """Hides the tokens that the grammar does not allow next, in every row and beam."""

    def __init__(self, grammar: CodeGrammar, modalities: Sequence[str]):
        """Answers may consist of `modalities`: "text" and kinds of media that the model writes."""
        self._grammar, self._modalities = grammar, modalities
        self._contents: Optional[AnswerContents] = None

    def prepare(self, ends: Collection[int], prompt: int, longest: int) -> None:
        """Begin a call of `generate`.

        Args:
            ends: tokens that end an answer.
            prompt: columns of the prompts, which the grammar does not apply to.
            longest: columns of the prompts and the answers together.

        Raises:
            ValueError: the model does not write a modality, or there is no room for an item.
        """
        self._prompt, self._longest = prompt, longest
        self._contents = self._grammar.contents(self._modalities, ends, longest - prompt)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with minus infinity for tokens that must not come next.

        Args:
            input_ids: [B, T] int64, prompts and answers so far.
            scores: [B, V].

        Returns:
            [B, V].
        """
        assert self._contents is not None, "transformers did not prepare the processor"
        kept = torch.full_like(scores, float("-inf"))
        room = self._longest - input_ids.size(1)
        for row, tokens in enumerate(input_ids[:, self._prompt :].tolist()):
            item = self._grammar.open_item(tokens)
            for ids in self._grammar.next_ids(item, self._contents, room, empty=not tokens):
                kept[row, ids.start : ids.stop] = scores[row, ids.start : ids.stop]
        return kept
