"""Skipping the backward pass of packs without media under a frozen Llama does not change results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import train
from ranks import run_ranks
from tiny import make_config, make_shards
from torch.utils.flop_counter import FlopCounterMode

from megatron_anymal.config import RunConfig
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.step import train_step

# Name -> number of processes, model settings.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "virtual pipeline": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "replicas": (2, {}),
    "overlapped replicas": (2, {}),
}


@pytest.fixture(scope="module")
def config(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("text_only")
    shards = make_shards(folder / "shards", tokenizer_folder, 48, ("image", "text", "text", "text", "text", "imu"))
    config = make_config(shards, tokenizer_folder, folder / "run")
    # A pack holds two or three documents, so most packs have no media.
    config.data.seq_length = 24
    config.model.global_batch_size = 12
    config.trainer.max_steps = 4
    config.exp_manager.checkpoint.every_n_train_steps = 0
    return config


def run(config: RunConfig, layout: str, skips: bool, folder: Path) -> tuple[dict[str, Any], list[bool]]:
    """In a rank: train with or without skipping; also return whether each micro-batch has a gradient."""
    processes, settings = LAYOUTS[layout]
    config.trainer.devices = processes
    config.exp_manager.explicit_log_dir = str(folder / f"{layout}_{skips}")
    for key, value in settings.items():
        setattr(config.model, key, value)
    config.model.ddp.overlap_grad_reduce = config.model.ddp.overlap_param_gather = layout == "overlapped replicas"
    original, seen = AnyMALModel._has_gradient, []

    def teaches(self: AnyMALModel, micro_batch: Any) -> bool:
        seen.append(original(self, micro_batch))
        return seen[-1] or not skips

    AnyMALModel._has_gradient = teaches  # type: ignore[method-assign]
    return train(config), seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_changes(config: RunConfig, layout: str, tmp_path: Path) -> None:
    processes, _ = LAYOUTS[layout]
    (skipped, seen), *_ = run_ranks(processes, run, config, layout, True, tmp_path)
    (whole, _), *_ = run_ranks(processes, run, config, layout, False, tmp_path)
    # Both kinds of packs occur.
    assert 0.3 < np.mean(seen) < 0.9
    assert skipped["losses"] == whole["losses"]
    assert skipped["weights"].keys() == whole["weights"].keys()
    for name, weight in whole["weights"].items():
        np.testing.assert_array_equal(skipped["weights"][name], weight, err_msg=name)


def run_with_dummies(config: RunConfig, layout: str, always: bool, folder: Path) -> tuple[dict[str, Any], float]:
    """In a rank: train with or without encoding modalities that a pack does not have; also return how many modalities
    a pack encodes on average."""
    original, encoded = AnyMALModel.set_trainable, []

    def set_trainable(self: AnyMALModel, *given: Any, every_pass: bool) -> None:
        original(self, *given, every_pass=every_pass or always)

    soft_tokens = AnyMALModel.soft_tokens

    def counted(self: AnyMALModel, micro_batch: Any) -> dict[str, Any]:
        soft = soft_tokens(self, micro_batch)
        encoded.append(len(soft))
        return soft

    AnyMALModel.set_trainable, AnyMALModel.soft_tokens = set_trainable, counted  # type: ignore[method-assign,assignment]
    return run(config, layout, True, folder)[0], float(np.mean(encoded)) if encoded else 0.0


@pytest.mark.parametrize("layout", ["one", "pipeline", "sequence parallel", "replicas"])
def test_modalities_without_media_need_not_be_encoded(config: RunConfig, layout: str, tmp_path: Path) -> None:
    """Unless gradients are reduced during the backward pass, which then needs all of them."""
    processes, _ = LAYOUTS[layout]
    (sparse, some), *_ = run_ranks(processes, run_with_dummies, config, layout, False, tmp_path / "sparse")
    (always, all_of_them), *_ = run_ranks(processes, run_with_dummies, config, layout, True, tmp_path / "always")
    assert all_of_them == 3.0 and some < 1.0
    assert sparse["losses"] == always["losses"]
    for name, weight in always["weights"].items():
        np.testing.assert_array_equal(sparse["weights"][name], weight, err_msg=name)


def test_overlapped_reductions_encode_every_modality(config: RunConfig, tmp_path: Path) -> None:
    (_, encoded), *_ = run_ranks(2, run_with_dummies, config, "overlapped replicas", False, tmp_path)
    assert encoded == 3.0


def products(config: RunConfig, trains: bool) -> dict[bool, float]:
    """Return matmul FLOPs per parameter of the Llama and token of a micro-batch, by whether it has media. Parameters
    after the last attention count tokens with a label."""
    config.model.language_model.freeze = not trains
    state = build(config, initialize(config))
    planner, flops = state.train_data.planner, {}
    plan = planner.plan(0)
    decoder: Any = state.models[0].language_model.decoder
    inside = sum(p.numel() for p in decoder.parameters() if p.dim() == 2)
    last = [decoder.layers[-1].self_attention.linear_proj, decoder.layers[-1].mlp]
    after = sum(p.numel() for module in last for p in module.parameters())
    for micro_batch in plan.of_replica(0):
        read = state.train_data.reader[micro_batch]
        wrapped = state.wrapped[0]
        wrapped.zero_grad_buffer()
        with FlopCounterMode(mods=state.models[0].language_model.decoder, display=False) as counter:
            wrapped.train()(read, labels=read.labels).sum().backward()
        counts = counter.get_flop_counts()
        of_decoder = next(count for name, count in counts.items() if name.endswith("decoder"))
        mm = sum(number for operation, number in of_decoder.items() if "mm" in str(operation))
        media = any(sample.media for sample in micro_batch.samples)
        assert read.label_index is not None and len(read.label_index) < read.tokens.numel()
        flops[media] = mm / ((inside - after) * read.tokens.numel() + after * len(read.label_index))
    return flops


def test_the_backward_pass_is_not_made(config: RunConfig) -> None:
    # 2 for the forward pass, 2 for the gradient of the input. Operations before the decoder are counted as part of its
    # backward pass, hence the tolerance.
    frozen = run_ranks(1, products, config, False)[0]
    assert frozen[False] == 2.0 and frozen[True] == pytest.approx(4.0, rel=0.03)
    # A trainable Llama has gradients from text.
    trained = run_ranks(1, products, config, True)[0]
    assert trained[False] == pytest.approx(6.0, rel=0.03) == trained[True]


def test_a_step_of_text_alone(config: RunConfig, text_shards: str) -> None:
    config.data.train["mix"].path = text_shards
    assert run_ranks(1, one_step, config)[0] == 0.0


def one_step(config: RunConfig) -> float:
    """In a rank: train one step and return its gradient norm."""
    state = build(config, initialize(config))
    plan = state.train_data.planner.plan(0)
    result = train_step(state, plan, [state.train_data.reader[m] for m in plan.of_replica(0)])
    assert result.loss > 1 and not result.skipped
    return result.grad_norm
