"""Runs that train marks and codes on an imported Llama."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from engine import train
from parity.discrete import SECTIONS, codes_in_documents
from tiny import LLAMA, make_config
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools import import_hf
from megatron_anymal.config import RunConfig
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary

# More entries than tokens: the export must fill the gap.
VOCABULARY = DiscreteVocabulary(33, SECTIONS)


def run_of(text_shards: str, tokenizer: str, folder: Path, *, tied: bool) -> RunConfig:
    """Import a folder, and train marks and codes on it under two tensor-parallel ranks."""
    torch.manual_seed(0)
    shape = {**LLAMA, "vocab_size": 33, "tie_word_embeddings": tied}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "llama")
    arguments = ["--hf", str(folder / "llama"), "--out", str(folder / "imported")]
    assert import_hf.main(arguments) == 0
    config = make_config(text_shards, tokenizer, folder / "run")
    config.model.modalities, config.model.discrete = {}, dict(SECTIONS)
    config.model.language_model.config, config.model.language_model.checkpoint = {}, str(folder / "imported")
    config.trainer.max_steps, config.trainer.devices = 2, 2
    config.model.tensor_model_parallel_size = 2
    return config


def train_on_codes(config: RunConfig) -> dict[str, Any]:
    # The Llama's vocabulary is known from its checkpoint only.
    model = copy.deepcopy(config.model)
    model.language_model.config = {"vocab_size": VOCABULARY.base_size}
    with codes_in_documents(model):
        return train(config)
