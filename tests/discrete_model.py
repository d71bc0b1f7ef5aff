"""Small exported models that write media as codes, and an independent check of their grammar."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Optional

from codes import sections
from hf_parts import make_config, make_model
from transformers import AutoTokenizer

from megatron_anymal.config import DiscreteConfig
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.hf.processing_anymal import AnyMALProcessor

# Meaning of the ids of codes.sections(): <picture> and </picture>, <speech> and </speech>, and codes of its codebooks.
_LETTERS = {32: "P", 33: "p", 39: "S", 40: "s"}
_WRITTEN = re.compile(r"(?:t|Pcccp|S(a+)(b+)s)*")
_SPEECH = re.compile(r"S(a+)(b+)s")


def is_grammatical(tokens: Sequence[int]) -> bool:
    """Whether tokens are text, pictures of three codes, and speech with as many codes of each of two codebooks."""
    letters = "".join(_LETTERS.get(n) or ("t" if n < 32 else "c" if n < 39 else "a" if n < 45 else "b") for n in tokens)
    speech = _SPEECH.findall(letters)
    return bool(_WRITTEN.fullmatch(letters)) and all(len(first) == len(second) for first, second in speech)


def discrete_generator(
    tokenizer_folder: str, discrete: Optional[dict[str, DiscreteConfig]] = None, std: float = 0.5
) -> ExportedGenerator:
    """An untrained model in this process, without encoders."""
    config = make_config({}, tokenizer_folder, discrete or sections())
    processor = AnyMALProcessor(AutoTokenizer.from_pretrained(tokenizer_folder), {}, config.discrete)
    return ExportedGenerator(make_model(config, std), processor)
