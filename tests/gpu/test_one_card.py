"""The engine on one CUDA GPU. Skipped if there is none."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import losses, train
from parity.layouts import Layout
from parity.suite import Suite
from ranks import run_ranks
from tiny import make_config

from megatron_anymal import backend
from megatron_anymal.config import RunConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.precision = "bf16"
    return config


def test_resume_is_bit_identical(config: RunConfig, tmp_path: Path) -> None:
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir = str(tmp_path / "whole")
    undisturbed = run_ranks(1, train, whole)[0]["losses"]
    for steps in (3, 6):
        config.trainer.max_steps, config.model.optim.sched.decay_steps = steps, 6
        run_ranks(1, train, config)
    assert losses(Path(config.exp_manager.explicit_log_dir)) == undisturbed


@pytest.mark.parametrize("layout", [Layout(), Layout(trains="full"), Layout(job="sft", trains="lora", noise="all")])
def test_one_card_gives_the_numbers_of_plain_torch(layout: Layout, tmp_path: Path) -> None:
    # Both in fp32, without TF32. Only the order of sums differs on the GPU.
    difference = Suite(tmp_path, steps=3).difference(layout)
    assert difference.allowed, difference


@pytest.mark.skipif(
    not backend.capabilities().transformer_engine, reason="needs Transformer Engine: pip install -e '.[te]'"
)
def test_transformer_engine_equals_local_layers(config: RunConfig, tmp_path: Path) -> None:
    run_losses = {}
    for implementation in ("local", "transformer_engine"):
        one = copy.deepcopy(config)
        one.model.transformer_impl = implementation
        one.exp_manager.explicit_log_dir = str(tmp_path / implementation)
        run_losses[implementation] = run_ranks(1, train, one)[0]["losses"]
    np.testing.assert_allclose(run_losses["transformer_engine"], run_losses["local"], rtol=5e-3)
