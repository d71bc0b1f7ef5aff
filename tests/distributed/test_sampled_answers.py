"""Sampled answers during training are saved, logged, and the same under every layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ranks import run_ranks
from tiny import make_config, make_conversations

from megatron_anymal.config import DatasetConfig, LoraConfig, RunConfig
from megatron_anymal.generation.validation_answers import SampledAnswers
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.loop import fit


class Board:
    """A logger with TensorBoard's `add_text`."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str, int]] = []
        self.experiment = self

    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))


def answer(config: RunConfig) -> tuple[str, list[tuple[str, str, int]]] | None:
    state, run_dir, board = build(config, initialize(config)), Path(config.exp_manager.explicit_log_dir), Board()
    fit(state, run_dir, [board], SampledAnswers(state, run_dir, [board]))
    return ((run_dir / "answers.jsonl").read_text(), board.texts) if state.layout.reports else None


def test_answers_are_the_same_under_every_layout(tokenizer_folder: str, tmp_path: Path) -> None:
    data = make_conversations(tmp_path / "data", tokenizer_folder, 24)
    config = make_config(data, tokenizer_folder, tmp_path / "run")
    config.job, config.model.lora = "sft", LoraConfig(r=4)
    config.data.validation = {"a": DatasetConfig(path=data), "b": DatasetConfig(path=data)}
    config.trainer.sampled_answers, config.trainer.val_check_interval, config.trainer.limit_val_batches = 3, 3, 1
    # Larger weights, so that the answers are not empty.
    config.model.language_model.config["initializer_range"] = 0.4
    answers: list[Any] = []
    for number, layout in enumerate(
        ({}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2})
    ):
        part = copy.deepcopy(config)
        part.exp_manager.explicit_log_dir = str(tmp_path / str(number))
        part.trainer.devices = 2 if layout else 1
        for name, value in layout.items():
            setattr(part.model, name, value)
        answers.append(run_ranks(part.trainer.devices, answer, part)[0])
    assert answers[0] == answers[1] == answers[2]
    rows = [json.loads(line) for line in answers[0][0].splitlines()]
    assert [(row["step"], row["sample"].partition("/")[0]) for row in rows] == [
        *[(3, "a"), (3, "b"), (3, "b")],
        *[(6, "a"), (6, "b"), (6, "b")],
    ]
    assert all(row["expected"] for row in rows) and any(row["given"] for row in rows)
    assert [text for _, text, _ in answers[0][1]] == [f"expected: {r['expected']}\n\ngiven: {r['given']}" for r in rows]
