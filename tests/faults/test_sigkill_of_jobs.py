"""SFT and DPO runs that are killed without warning and restarted end like undisturbed runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from engine import train
from ranks import run_ranks
from test_sigkill import figures, finish, kill, start, steps_of
from tiny import make_config, make_conversations

from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.config.compose import compose

STEPS, EVERY = 10, 3


def tuned(job: str, tokenizer: str, folder: Path) -> RunConfig:
    """Ten steps with a checkpoint every three steps; DPO starts from an SFT run of three steps."""
    data = make_conversations(folder / job, tokenizer, 40, pairs=job == "dpo")
    config = make_config(data, tokenizer, folder / f"{job}_run")
    config.job, config.trainer.max_steps, config.data.seq_length = job, STEPS, 96
    config.exp_manager.checkpoint.every_n_train_steps = EVERY
    config.model.lora, config.model.neftune.alpha = LoraConfig(r=4, alpha=8.0, dropout=0.1), 5.0
    if job == "dpo":
        config.model.restore_from_path = str(folder / "sft_run")
        for modality in config.model.modalities.values():
            modality.projector.freeze = modality.encoder.freeze = True
    return config


# DPO starts from the adapters of an SFT run.
@pytest.mark.parametrize("job", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_killed_in_the_middle(job: str, tokenizer_folder: str, tmp_path: Path) -> None:
    if job == "dpo":
        before = tuned("sft", tokenizer_folder, tmp_path)
        before.trainer.max_steps = 3
        run_ranks(1, train, before)
    config = tuned(job, tokenizer_folder, tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))
    whole, run = tmp_path / "whole", tmp_path / "killed"
    run_ranks(1, train, compose("tiny", tmp_path, [f"exp_manager.explicit_log_dir={whole}"]).config)
    assert steps_of(whole) == list(range(1, STEPS + 1))

    [process] = start(tmp_path, run, job, 1, tmp_path / "killed.log")
    deadline = time.monotonic() + 240
    while len(steps_of(run)) < EVERY + 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    kill(process)
    assert EVERY + 2 <= max(steps_of(run), default=0) < STEPS, (tmp_path / "killed.log").read_text()[-3000:]

    again = tmp_path / "again.log"
    assert "resumed from" in finish(start(tmp_path, run, job, 1, again), again)
    assert figures(run) == figures(whole)
