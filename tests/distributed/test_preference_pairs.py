"""From judgements to DPO: what `anymal compare --export-pairs` writes is packed by `anymal prepare` and trained on."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
from engine import train
from judgements import make_prompts, row, write_lines
from ranks import run_ranks
from tiny import make_config, make_conversations

from megatron_anymal.cli import compare, prepare
from megatron_anymal.config import LoraConfig
from megatron_anymal.data.shard_index import ShardIndex


def test_ten_steps_of_dpo(tmp_path: Path, tokenizer_folder: str) -> None:
    prompts = make_prompts(tmp_path / "source", 24)
    (tmp_path / "out").mkdir()
    write_lines(tmp_path / "out" / "judgements.jsonl", [row(f"q{n}", "ann", "aab"[n % 3]) for n in range(24)])
    pairs = tmp_path / "pairs.jsonl"
    answers = [str(tmp_path / "source" / f"{name}.jsonl") for name in "ab"]
    options = [f"--prompts={prompts}", f"--out={tmp_path / 'out'}", "--report-only", f"--export-pairs={pairs}"]
    assert compare.main([*answers, *options]) == 0
    data = str(tmp_path / "data")
    assert prepare.main([f"--manifest={pairs}", f"--out={data}", f"--tokenizer={tokenizer_folder}"]) == 0
    index = ShardIndex(data)
    assert len(index) == 24 and {index.sample(n).kind for n in range(24)} == {"preference"}

    sft = make_config(make_conversations(tmp_path / "chat", tokenizer_folder, 16), tokenizer_folder, tmp_path / "sft")
    sft.job, sft.data.seq_length, sft.model.lora = "sft", 96, LoraConfig(r=4, alpha=8.0)
    sft.trainer.max_steps = 1
    run_ranks(1, train, sft)
    dpo = copy.deepcopy(sft)
    dpo.job, dpo.model.restore_from_path, dpo.trainer.max_steps = "dpo", str(tmp_path / "sft"), 10
    dpo.data.train["mix"].path, dpo.exp_manager.explicit_log_dir = data, str(tmp_path / "dpo")
    for modality in dpo.model.modalities.values():
        modality.projector.freeze = modality.encoder.freeze = True
    losses = run_ranks(1, train, dpo)[0]["losses"]
    # The policy begins as its own reference, at the loss log 2, and learns the preferences.
    assert len(losses) == 10 and losses[0] == pytest.approx(math.log(2)) and np.mean(losses[5:]) < math.log(2) - 0.03
