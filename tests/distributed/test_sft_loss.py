"""The SFT loss matches transformers with the same Llama, conversations and labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine import train
from parity.samples import read_steps
from ranks import run_ranks
from tiny import LLAMA, make_config, make_conversations
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_anymal.config import LoraConfig


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_equals_transformers(normalization: str, tokenizer_folder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA)).float().eval()
    llama.save_pretrained(tmp_path / "llama")
    data = make_conversations(tmp_path / "data", tokenizer_folder, 24, ("text",))
    config = make_config(data, tokenizer_folder, tmp_path / "run")
    config.job, config.model.modalities, config.trainer.max_steps = "sft", {}, 1
    config.model.language_model.config, config.model.language_model.path = {}, str(tmp_path / "llama")
    config.model.lora, config.model.loss_normalization = LoraConfig(r=4), normalization
    [loss] = run_ranks(1, train, config)[0]["losses"]
    [batch] = read_steps(config, 1)
    sums, counts = [], []
    for sample in batch:
        # Labels for transformers are aligned with the tokens; the model shifts them.
        labels = torch.full_like(sample.tokens, -100)
        labels[1:] = torch.where(sample.loss_mask[:-1] > 0, sample.tokens[1:], -100)
        count = int((labels >= 0).sum())
        with torch.no_grad():
            mean = llama(input_ids=sample.tokens[None], labels=labels[None]).loss
        sums.append(float(mean) * count)
        counts.append(count)
    by_sample = sum(s / c for s, c in zip(sums, counts)) / len(batch)
    assert loss == pytest.approx(by_sample if normalization == "sample" else sum(sums) / sum(counts), rel=1e-5)
    assert len(set(counts)) > 1 and abs(by_sample - sum(sums) / sum(counts)) > 1e-3
