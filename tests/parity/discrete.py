"""Discrete media in the parity runs: documents with marks and codes, and the layouts that they run under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tiny import SPECIAL, WORDS

from megatron_anymal.config import DiscreteConfig, ModelConfig
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.tokenizer import Document, Tokenizer
from parity.layouts import Layout

# 15 marks and codes: not divisible by a tensor-parallel size.
SECTIONS = {"picture": DiscreteConfig(codebooks=[5]), "speech": DiscreteConfig(codebooks=[3, 3])}
# Ids of ordinary words in tiny.make_tokenizer.
_WORD_IDS = range(len(SPECIAL) + 1, len(SPECIAL) + 1 + len(WORDS))


@contextmanager
def codes_in_documents(model: ModelConfig) -> Iterator[None]:
    """Replace about half of the words of every document by marks and codes, if the model has any."""
    if not model.discrete:
        yield
        return
    vocabulary = DiscreteVocabulary(int(model.language_model.config["vocab_size"]), model.discrete)
    original = Tokenizer.document

    def document(self: Tokenizer, *args: Any, **kwargs: Any) -> Document:
        plain = original(self, *args, **kwargs)
        tokens = [
            vocabulary.base_size + (7 * token + 3 * position) % vocabulary.added
            if token in _WORD_IDS and (token + position) % 2
            else token
            for position, token in enumerate(plain.tokens)
        ]
        return replace(plain, tokens=tokens)

    with patch.object(Tokenizer, "document", document):
        yield


_TEXT = Layout(media="text", rows="new").shallow
DISCRETE = tuple(
    replace(_TEXT, **settings)
    for settings in (
        {},
        {"tied_head": True},
        {"tensor": 2},
        {"tensor": 2, "sequence": True, "tied_head": True},
        {"tensor": 4, "sequence": True, "media": "mixed"},
        {"pipeline": 2, "tied_head": True},
        {"pipeline": 2, "virtual": 2, "tied_head": True, "overlap": True, "data": 2},
        {"tensor": 2, "sequence": True, "pipeline": 2, "virtual": 2, "media": "mixed", "trains": "lora"},
        {"context": 2, "data": 2, "media": "image"},
        {"data": 2, "overlap": True, "tied_head": True},
        {"data": 2, "distributed_optimizer": False, "packs": 2, "recompute": "full"},
        {"tensor": 2, "pipeline": 2, "data": 2, "tied_head": True, "distributed_optimizer": False},
        {"tensor": 2, "sequence": True, "context": 2, "trains": "full", "recompute": "selective"},
        {"tensor": 2, "pipeline": 2, "trains": "full", "rows": "all", "tied_head": True},
        {"tensor": 4, "data": 2, "trains": "full", "rows": "all", "overlap": True},
        {"pipeline": 4, "virtual": 2, "trains": "full", "rows": "all", "layers": 8},
        {"job": "sft", "tensor": 2, "sequence": True, "trains": "lora", "noise": "all", "mean": "sample"},
        {"job": "sft", "pipeline": 2, "context": 2, "trains": "lora", "tied_head": True, "noise": "text"},
    )
)
