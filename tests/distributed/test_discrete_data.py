"""Samples with codes through a run: the same losses under several layouts and after a resume, and losses by kind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codes import codes, item, with_codes
from engine import train
from manifests import shards_of
from ranks import run_ranks
from tiny import make_config, png

from megatron_anymal.config import DatasetConfig, RunConfig
from megatron_anymal.generation.validation_answers import SampledAnswers
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.loop import fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """Captions and drawings, with codes in questions and answers beside pictures for the encoder."""
    draw = np.random.default_rng(0).integers
    files = {"x.png": png(1)}
    lines: list[dict[str, Any]] = []
    for number in range(24):
        files[f"p{number}.codes.npy"] = codes(draw(0, 5, 3))
        files[f"s{number}.codes.npy"] = codes(draw(0, 4, (2, 1 + number % 4)))
        picture, speech = item(f"p{number}", "picture"), item(f"s{number}", "speech")
        asked = [{"text": "what is"}, *([{"media": "x.png"}] if number % 3 else []), speech if number % 2 else picture]
        answer = [{"text": "one"}, picture if number % 2 else speech]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lines.append({"key": f"k{number}", "messages": turns})
    return shards_of(tmp_path_factory.mktemp("codes") / "data", tokenizer_folder, lines, files)


def run(folder: str, tokenizer: str, run_dir: Path, world: int = 1, **layout: Any) -> RunConfig:
    config = with_codes(make_config(folder, tokenizer, run_dir))
    config.job = "sft"
    config.trainer.devices = world
    for name, value in layout.items():
        setattr(config.model, name, value)
    return config


def test_losses_are_those_of_one_process(folder: str, tokenizer_folder: str, tmp_path: Path) -> None:
    [alone] = run_ranks(1, train, run(folder, tokenizer_folder, tmp_path / "one"))
    split = run(folder, tokenizer_folder, tmp_path / "two", 2, context_parallel_size=2)
    apart = run(folder, tokenizer_folder, tmp_path / "three", 2)
    for config in (split, apart):
        results = run_ranks(2, train, config)[0]
        np.testing.assert_allclose(results["losses"], alone["losses"], rtol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "loss" in row)
    assert {"loss/picture", "loss/speech", "target_loss/picture", "target_loss/speech"} <= row.keys()
    assert row["target_tokens/picture"] % 5 == 0


def test_a_resume_continues_exactly(folder: str, tokenizer_folder: str, tmp_path: Path) -> None:
    whole = run(folder, tokenizer_folder, tmp_path / "whole")
    whole.model.optim.sched.decay_steps = 6
    [expected] = run_ranks(1, train, whole)
    first = copy.deepcopy(whole)
    first.exp_manager.explicit_log_dir = str(tmp_path / "cut")
    first.trainer.max_steps = 3
    run_ranks(1, train, first)
    second = copy.deepcopy(first)
    second.trainer.max_steps = 6
    [resumed] = run_ranks(1, train, second)
    assert resumed["losses"] == expected["losses"]
    for name, weight in expected["weights"].items():
        np.testing.assert_array_equal(resumed["weights"][name], weight)


def answered(config: RunConfig) -> str:
    """In a rank: train, and return the answers to validation samples."""
    state, run_dir = build(config, initialize(config)), Path(config.exp_manager.explicit_log_dir)
    fit(state, run_dir, [], SampledAnswers(state, run_dir, []))
    return (run_dir / "answers.jsonl").read_text() if state.layout.reports else ""


def test_answers_to_validation_samples_have_codes(folder: str, tokenizer_folder: str, tmp_path: Path) -> None:
    config = run(folder, tokenizer_folder, tmp_path / "one")
    config.model.language_model.config["initializer_range"] = 0.6
    config.data.validation = {"a": DatasetConfig(path=folder)}
    config.trainer.max_steps, config.trainer.val_check_interval = 2, 1
    config.trainer.sampled_answers, config.trainer.limit_val_batches = 8, 1
    split = copy.deepcopy(config)
    split.exp_manager.explicit_log_dir = str(tmp_path / "two")
    split.trainer.devices = split.model.tensor_model_parallel_size = 2
    [answers] = run_ranks(1, answered, config)
    assert run_ranks(2, answered, split)[0] == answers
    rows = [json.loads(line) for line in answers.splitlines()]
    assert len(rows) == 16 and [row["expected"] for row in rows[:2]] == ["one[speech 1]", "one[picture 1]"]
    for row in rows:
        number = int(row["sample"].removeprefix("a/k"))
        [text, item] = row["expected_parts"]
        assert text == {"text": "one"} and item["modality"] == ("picture" if number % 2 else "speech")
        assert np.array(item["codes"]).shape == ((1, 3) if number % 2 else (2, 1 + number % 4))
    assert any("given_parts" in row for row in rows)
