"""An unchanged run is never refused when it resumes, even if encoding modifies its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizer_folders
from engine import losses
from ranks import run_ranks
from tiny import LLAMA, make_config, make_conversations, make_shards

from megatron_anymal.config import DatasetConfig, LoraConfig, RunConfig
from megatron_anymal.generation.validation_answers import SampledAnswers
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.loop import fit


def go_on(config: RunConfig) -> None:
    """Train as `anymal` does, with sampled answers if the run has any."""
    state, run_dir = build(config, initialize(config)), Path(config.exp_manager.explicit_log_dir)
    fit(state, run_dir, [], SampledAnswers(state, run_dir, []) if config.trainer.sampled_answers else None)


@pytest.mark.parametrize("answers", [0, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["truncation", "padding"])
def test_the_same_command_goes_on(name: str, workers: int, answers: int, tmp_path: Path) -> None:
    tokenizer = tokenizer_folders.make(name, tmp_path / "tokenizer")
    if answers:
        data = make_conversations(tmp_path / "data", tokenizer, 16, ("image", "text"))
    else:
        data = make_shards(tmp_path / "data", tokenizer, 16, ("image", "text"))
    config = make_config(data, tokenizer, tmp_path / "run")
    config.model.modalities = {"image": config.model.modalities["image"]}
    config.model.language_model.config = {**LLAMA, "vocab_size": 448, "num_hidden_layers": 2}
    config.model.optim.sched.name, config.data.seq_length, config.data.num_workers = "constant", 256, workers
    config.trainer.max_steps, config.exp_manager.checkpoint.every_n_train_steps = 2, 1
    if answers:
        config.job, config.model.lora = "sft", LoraConfig(r=4)
        config.data.validation = {"all": DatasetConfig(path=data)}
        config.trainer.sampled_answers, config.trainer.val_check_interval, config.trainer.limit_val_batches = 2, 1, 1
    run_ranks(1, go_on, config)
    config.trainer.max_steps = 4
    run_ranks(1, go_on, config)
    assert len(losses(tmp_path / "run")) == 4
    if answers:
        rows = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4]
