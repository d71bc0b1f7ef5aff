"""FP8 follows bf16, resumes bit-identically and halves the memory of weights. Skipped if FP8 is not available."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import losses, train
from ranks import run_ranks
from tiny import make_config

from megatron_anymal import backend
from megatron_anymal.config import RunConfig
from megatron_anymal.model.quantized_weights import is_quantized
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build

FOUND = backend.capabilities()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not FOUND.cuda_devices, reason="there is no CUDA device"),
    pytest.mark.skipif(not FOUND.fp8, reason="needs a GPU with FP8 (compute capability 8.9 or later)"),
    pytest.mark.skipif(not FOUND.transformer_engine, reason="needs Transformer Engine: pip install -e '.[te]'"),
]
WAYS = [
    (form, recipe, held)
    for form in ("hybrid", "e4m3")
    for recipe in ("tensorwise", "delayed")
    for held in (False, True)
]


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """A frozen Llama of the quickstart's size, with the feed-forward size rounded to a multiple of 16."""
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.precision = "bf16"
    config.model.transformer_impl = "transformer_engine"
    config.model.language_model.config |= {"hidden_size": 128, "intermediate_size": 352}
    config.model.optim.lr = 3e-3
    config.exp_manager.checkpoint.every_n_train_steps = 0
    return config


def in_fp8(config: RunConfig, form: str, recipe: str, held: bool) -> RunConfig:
    changed = copy.deepcopy(config)
    changed.model.fp8, changed.model.fp8_recipe, changed.model.fp8_primary_weights = form, recipe, held
    changed.exp_manager.explicit_log_dir += f"_{form}_{recipe}_{held}"
    return changed


@pytest.mark.parametrize(("form", "recipe", "held"), WAYS)
def test_follows_bf16_for_200_steps(config: RunConfig, form: str, recipe: str, held: bool) -> None:
    config.trainer.max_steps = 200
    plain = run_ranks(1, train, config, timeout=280)[0]["losses"]
    fp8_losses = run_ranks(1, train, in_fp8(config, form, recipe, held), timeout=280)[0]["losses"]
    assert np.mean(fp8_losses[-20:]) == pytest.approx(np.mean(plain[-20:]), rel=5e-3)


def gradient(config: RunConfig) -> np.ndarray:
    """In a rank: return the projectors' gradient of the first batch."""
    state = build(config, initialize(config))
    wrapped = state.wrapped[0].train()
    # Delayed scaling uses past statistics, so the second pass is scaled by those of the first.
    for _ in range(2):
        wrapped.zero_grad_buffer()
        for planned in state.train_data.planner.plan(0).of_replica(0):
            read: Any = state.train_data.reader[planned]
            moved = {
                n: getattr(read, n).cuda() for n in ("tokens", "labels", "loss_mask", "sample_positions", "label_index")
            }
            for media in read.media.values():
                media.pieces, media.token_index = media.pieces.cuda(), media.token_index.cuda()
            for name, tensor in moved.items():
                setattr(read, name, tensor)
            (wrapped(read, labels=read.labels) * read.loss_mask).sum().backward()
    named = state.models[0].named_parameters()
    return np.concatenate(
        [
            p.main_grad.float().flatten().cpu().numpy()
            for n, p in named
            if n.startswith("projectors.") and p.requires_grad
        ]
    )


@pytest.mark.parametrize(("form", "recipe", "held"), WAYS)
def test_gradients_of_projectors_point_the_same_way(config: RunConfig, form: str, recipe: str, held: bool) -> None:
    plain = run_ranks(1, gradient, config)[0]
    fp8_gradient = run_ranks(1, gradient, in_fp8(config, form, recipe, held))[0]
    assert plain @ fp8_gradient / np.linalg.norm(plain) / np.linalg.norm(fp8_gradient) > 0.99


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_resume_is_bit_identical(config: RunConfig, recipe: str, tmp_path: Path) -> None:
    config = in_fp8(config, "hybrid", recipe, True)
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir = str(tmp_path / "whole")
    undisturbed = run_ranks(1, train, whole)[0]["losses"]
    for steps in (3, 6):
        config.trainer.max_steps, config.model.optim.sched.decay_steps = steps, 6
        run_ranks(1, train, config)
    assert losses(Path(config.exp_manager.explicit_log_dir)) == undisturbed


def bytes_held(config: RunConfig) -> tuple[int, int]:
    """In a rank: return allocated GPU memory in bytes after a step, and the number of quantized parameters."""
    config.trainer.max_steps = 1

    def look(state: TrainState) -> tuple[int, int]:
        quantized = sum(p.numel() for p in state.models[0].parameters() if is_quantized(p))
        return torch.cuda.memory_allocated(), quantized

    return train(config, look)["seen"]


def test_held_in_fp8_alone(config: RunConfig) -> None:
    config.model.language_model.config |= {"hidden_size": 1024, "intermediate_size": 4096}
    (plain, none), (held, quantized) = (
        run_ranks(1, bytes_held, in_fp8(config, "hybrid", "tensorwise", held))[0] for held in (False, True)
    )
    assert none == 0 and quantized > 5e7
    # One byte per parameter instead of two in bf16; no transposed copy and no workspace is kept.
    assert plain - held > 0.95 * quantized
