"""After a failure, a process that may stay gives up the models, keeps the frozen weights, and builds them in again."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA, make_config
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_anymal.config import RunConfig
from megatron_anymal.model import build as model_build
from megatron_anymal.model import kept_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.resilience import survival
from megatron_anymal.resilience.failure_record import forget_failures
from megatron_anymal.train import loop
from megatron_anymal.train.build import TrainState, build


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "llama")
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.model.language_model.path, config.model.language_model.config = str(tmp_path / "llama"), {}
    monkeypatch.setenv(survival.ENVIRONMENT, str(tmp_path))
    return config


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    kept_weights.take("")
    yield
    kept_weights.take("")


def fail(state: TrainState, run_dir: Path, monkeypatch: pytest.MonkeyPatch, after: int = 2) -> None:
    """Train until a step fails in the middle of a run."""
    step = loop.train_step

    def train_step(state: Any, plan: Any, *rest: Any) -> Any:
        if plan.step == after:
            raise RuntimeError("Connection closed by peer")
        return step(state, plan, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", train_step)
        with pytest.raises(RuntimeError, match="closed by peer"):
            loop.fit(state, run_dir)
    # It holds the traceback, and so the models.
    forget_failures()


def llama_of(state: TrainState) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in state.models[0].named_parameters() if name.startswith("language_model.")}


def failed(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], list[weakref.ref[Any]]]:
    """Build, train and fail; return where the Llama's weights are, and what should be collected."""
    state = build(config, initialize(config))
    fail(state, config.run_dir, monkeypatch)
    places = {name: weight.data_ptr() for name, weight in llama_of(state).items()}
    return places, [weakref.ref(thing) for thing in (state.models[0], state.wrapped[0], state.optimizer)]


def test_the_frozen_weights_are_kept_and_everything_else_is_let_go(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = llama_of(build(copy.deepcopy(config), initialize(config)))
    places, given_up = failed(config, monkeypatch)
    gc.collect()
    assert [thing() for thing in given_up] == [None, None, None]

    def read(*arguments: Any) -> None:
        raise AssertionError("the weights were read again")

    # The encoder of imu trains, so it is built anew.
    seeded, built = model_build.seeded_encoder, []
    monkeypatch.setattr(model_build, "load_hf_llama", read)
    monkeypatch.setattr(model_build, "seeded_encoder", lambda name, *rest: built.append(name) or seeded(name, *rest))
    state = build(config, initialize(config))
    assert {name: weight.data_ptr() for name, weight in llama_of(state).items()} == places
    assert built == [name for name, section in config.model.modalities.items() if not section.encoder.freeze] != []
    for name, weight in llama_of(state).items():
        assert torch.equal(weight, fresh[name]) and not weight.requires_grad
    # Taken once: what is built in may not be built into another model, too.
    assert kept_weights.take(state.frozen_source) is kept_weights.NOTHING


def test_a_run_that_builds_them_in_is_bit_identical(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(config: RunConfig) -> dict[str, torch.Tensor]:
        state = build(config, initialize(config))
        loop.fit(state, config.run_dir)
        return {name: weight.detach().clone() for name, weight in state.models[0].named_parameters()}

    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir += "_whole"
    expected = finish(whole)
    failed(config, monkeypatch)
    found = finish(config)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_files_that_have_changed_are_read_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    places, _ = failed(config, monkeypatch)
    os.utime(Path(config.model.language_model.path) / "model.safetensors", (1, 1))
    state = build(config, initialize(config))
    assert not {weight.data_ptr() for weight in llama_of(state).values()} & set(places.values())


@pytest.mark.parametrize("key", ["seed", "precision", "rank"])
def test_they_belong_to_one_configuration_and_one_rank(key: str, config: RunConfig) -> None:
    layout = initialize(config)
    one = kept_weights.source(config.model, "32", layout)
    kept_weights.keep(one, [], {})
    other = copy.deepcopy(config.model)
    if key == "seed":
        other.seed += 1
    elsewhere = copy.copy(layout)
    if key == "rank":
        object.__setattr__(elsewhere, "tensor_rank", 1)
    source = kept_weights.source(other, "bf16" if key == "precision" else "32", elsewhere)
    assert source != one and kept_weights.take(source) is kept_weights.NOTHING


def test_weights_that_train_are_not_kept(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.model.language_model.freeze = False
    places, _ = failed(config, monkeypatch)
    state = build(config, initialize(config))
    assert not {weight.data_ptr() for weight in llama_of(state).values()} & set(places.values())


def test_a_process_that_cannot_stay_keeps_nothing(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(survival.ENVIRONMENT)
    state = build(config, initialize(config))
    fail(state, config.run_dir, monkeypatch)
    assert kept_weights.take(state.frozen_source) is kept_weights.NOTHING
