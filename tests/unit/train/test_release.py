"""After a failure, a process that may stay gives up the models, keeps the frozen weights, and builds them in again."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
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
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "llama")
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.model.language_model.path, config.model.language_model.config = str(tmp_path / "llama"), {}
    return config


def fail(state: TrainState, run_dir: Path, after: int = 2) -> None:
    """Train until a step fails in the middle of a run."""
    step = loop.train_step

    def train_step(state: Any, plan: Any, *rest: Any) -> Any:
        if plan.step == after:
            raise RuntimeError("Connection closed by peer")
        return step(state, plan, *rest)

    loop.train_step = train_step
    with pytest.raises(RuntimeError, match="closed by peer"):
        loop.fit(state, run_dir)
    loop.train_step = step
    # It holds the traceback, and so the models.
    forget_failures()


def llama_of(state: TrainState) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in state.models[0].named_parameters() if name.startswith("language_model.")}


def failed(config: RunConfig, *, may_stay: bool = True) -> tuple[dict[str, int], list[weakref.ref[Any]]]:
    """Build, train and fail; return where the Llama's weights are, and what should be collected."""
    if may_stay:
        os.environ[survival.ENVIRONMENT] = "folder"
    state = build(config, initialize(config))
    fail(state, config.run_dir)
    places = {name: weight.data_ptr() for name, weight in llama_of(state).items()}
    return places, [weakref.ref(thing) for thing in (state.models[0], state.wrapped[0], state.optimizer)]


def kept_and_let_go(config: RunConfig) -> None:
    fresh = llama_of(build(copy.deepcopy(config), initialize(config)))
    places, given_up = failed(config)
    gc.collect()
    assert [thing() for thing in given_up] == [None, None, None]

    def read(*arguments: Any) -> None:
        raise AssertionError("the weights were read again")

    # The encoder of imu trains, so it is built anew.
    seeded, built = model_build.seeded_encoder, []
    model_build.load_hf_llama = read
    model_build.seeded_encoder = lambda name, *rest: built.append(name) or seeded(name, *rest)
    state = build(config, initialize(config))
    assert {name: weight.data_ptr() for name, weight in llama_of(state).items()} == places
    assert built == [name for name, section in config.model.modalities.items() if not section.encoder.freeze] != []
    for name, weight in llama_of(state).items():
        assert torch.equal(weight, fresh[name]) and not weight.requires_grad
    # Taken once: what is built in may not be built into another model, too.
    assert kept_weights.take(state.frozen_source) is kept_weights.NOTHING


def test_the_frozen_weights_are_kept_and_everything_else_is_let_go(config: RunConfig) -> None:
    run_ranks(1, kept_and_let_go, config)


def trained(config: RunConfig, fails_first: bool) -> dict[str, Any]:
    if fails_first:
        failed(config)
    state = build(config, initialize(config))
    loop.fit(state, config.run_dir)
    return {name: weight.detach().numpy() for name, weight in state.models[0].named_parameters()}


def test_a_run_that_builds_them_in_is_bit_identical(config: RunConfig) -> None:
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir += "_whole"
    [expected], [weights] = run_ranks(1, trained, whole, False), run_ranks(1, trained, config, True)
    assert weights.keys() == expected.keys() and all((weights[name] == expected[name]).all() for name in weights)


def kept_after(config: RunConfig, change: str) -> bool:
    """In a rank: whether the next model has the weights of the one that failed."""
    config.model.language_model.freeze = change != "they train"
    places, _ = failed(config, may_stay=change != "it cannot stay")
    if change == "other files":
        os.utime(Path(config.model.language_model.path) / "model.safetensors", (1, 1))
    if change == "another seed":
        config.model.seed += 1
    if change == "another precision":
        config.trainer.precision = "bf16"
    layout = initialize(config)
    if change == "another rank":
        layout = replace(layout, tensor_rank=1)
    model = copy.deepcopy(config.model)
    kept = kept_weights.take(kept_weights.source(model, config.trainer.precision, layout))
    addresses = {weight.data_ptr() for chunk in kept.llama for weight in chunk.values()}
    assert not addresses or addresses == set(places.values())
    return bool(addresses)


@pytest.mark.parametrize(
    "change",
    ["none", "other files", "another seed", "another precision", "another rank", "they train", "it cannot stay"],
)
def test_when_they_are_kept(change: str, config: RunConfig) -> None:
    assert run_ranks(1, kept_after, config, change) == [change == "none"]
