"""Marks and codes of discrete media in an exported tokenizer."""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import AddedToken

from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.records import DataError
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.train.build import check_codes


def with_discrete_tokens(tokenizer: Tokenizer, vocabulary: DiscreteVocabulary) -> Any:
    """Return transformers' tokenizer, which knows marks and codes as special tokens, with the ids of training.

    Ids between the tokenizer's last token and the end of the Llama's vocabulary get names that no text has.

    Args:
        tokenizer: of the run; it is not changed.

    Raises:
        DataError: a mark or code is already a token of the tokenizer, or gets another id.
    """
    hf = tokenizer.hf
    if not vocabulary.added:
        return hf
    check_codes(tokenizer, vocabulary)
    known = hf.get_vocab().values()
    unused = [f"<|unused_{number}|>" for number in range(max(known) + 1, vocabulary.base_size)]
    added = [AddedToken(text, special=True, normalized=False) for text in (*unused, *vocabulary.texts())]
    grown = copy.deepcopy(hf)
    grown.add_tokens(added, special_tokens=True)
    for number, text in enumerate(vocabulary.texts(), start=vocabulary.base_size):
        actual = grown.convert_tokens_to_ids(text)
        if actual != number:
            raise DataError(
                f"model.discrete: the tokenizer in {hf.name_or_path!r} gives {text!r} the id {actual}; the model has "
                f"it at {number}. Use a tokenizer without gaps among its ids."
            )
    return grown
