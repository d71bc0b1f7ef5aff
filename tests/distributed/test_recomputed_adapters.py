"""Full recomputation with frozen projectors on one pipeline stage gives adapters the same gradients as without it.

Nothing before the Llama trains, and a recomputed layer has a backward pass only if its input requires a gradient.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from tiny import LLAMA, make_config, make_conversations

from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.step import train_step

# Adapters start with B = 0, so only the second step has gradients of A.
STEPS = 2
LAYERS = LLAMA["num_hidden_layers"]
# Method and number of layers.
FULL = [("uniform", 1), ("uniform", 2), ("block", 1), ("block", LAYERS)]


def gradients(config: RunConfig) -> list[dict[str, Any]]:
    """In a rank: the gradients of every step."""
    state = build(config, initialize(config))
    named = {name: p for name, p in state.models[0].named_parameters() if p.requires_grad}
    optimizer: Any = state.optimizer
    update, steps = optimizer.step, []

    def record() -> Any:
        steps.append({name: p.main_grad.numpy().copy() for name, p in named.items()})
        return update()

    optimizer.step = record
    for step in range(STEPS):
        plan = state.train_data.planner.plan(step)
        train_step(state, plan, [state.train_data.reader[m] for m in plan.of_replica(0)])
    return steps


def gradients_of(configs: list[RunConfig]) -> list[list[dict[str, Any]]]:
    """Return the gradients under each configuration, in order."""
    return [gradients(config) for config in configs]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_adapters_get_the_same_gradients(kind: str, tokenizer_folder: str, tmp_path: Path) -> None:
    data = make_conversations(tmp_path / "data", tokenizer_folder, 24, (kind,))
    config = make_config(data, tokenizer_folder, tmp_path / "run")
    config.job, config.model.lora = "sft", LoraConfig(r=4)
    config.model.modalities = {"image": config.model.modalities["image"]}
    config.model.modalities["image"].encoder.freeze = config.model.modalities["image"].projector.freeze = True
    configs = [config]
    for method, layers in FULL:
        configs.append(copy.deepcopy(config))
        model = configs[-1].model
        model.recompute_granularity, model.recompute_method, model.recompute_num_layers = "full", method, layers
    without, *recomputed = run_ranks(1, gradients_of, configs)[0]
    # Two adapter weights for each of seven projections per layer, and nothing else.
    assert len(without[-1]) == 14 * LAYERS and all(".lora." in name for name in without[-1])
    assert min(np.abs(gradient).max() for gradient in without[-1].values()) > 1e-5
    for setting, steps in zip(FULL, recomputed, strict=True):
        for expected, actual in zip(without, steps, strict=True):
            assert actual.keys() == expected.keys()
            for name, gradient in expected.items():
                rounding = 1e-5 * np.abs(gradient).max()
                np.testing.assert_allclose(actual[name], gradient, rtol=0, atol=rounding, err_msg=f"{setting}: {name}")
