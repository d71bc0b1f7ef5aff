"""Layout changes nothing: the same losses and weights from every way of splitting the run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import train
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import AnyMALConfig

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-uneven": (2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}),
    "dp2": (2, {}),
    "tp2-sp-pp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}),
    "pp2-dp2": (4, {"pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "cp4": (4, {"context_parallel_size": 4}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "tp2-sp-cp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}),
    "tp2-cp2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
    "pp2-vpp2-cp2": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "context_parallel_size": 2,
        },
    ),
    "cp2-dp2-full": (4, {"context_parallel_size": 2, "recompute_granularity": "full"}),
    "full-recompute": (1, {"recompute_granularity": "full"}),
    "selective-recompute": (1, {"recompute_granularity": "selective"}),
    "two-packs-a-pass": (1, {"micro_batch_size": 2}),
}


def laid_out(base: AnyMALConfig, world: int, options: dict[str, Any], run_dir: Path) -> AnyMALConfig:
    config = copy.deepcopy(base)
    config.trainer.devices = world
    config.exp_manager.explicit_log_dir = str(run_dir)
    for name, value in options.items():
        setattr(config.model, name, value)
    return config


@pytest.fixture(scope="module", params=["frozen", "trainable"])
def reference(
    request: pytest.FixtureRequest, mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AnyMALConfig, dict[str, Any]]:
    """One process, with the Llama frozen or training."""
    config = make_config(mixed_shards, tokenizer_folder, tmp_path_factory.mktemp("one"))
    config.model.language_model.freeze = request.param == "frozen"
    config.exp_manager.checkpoint.every_n_train_steps = 0
    return config, run_ranks(1, train, config)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_losses_and_weights(name: str, reference: tuple[AnyMALConfig, dict[str, Any]], tmp_path: Path) -> None:
    base, one = reference
    world, options = LAYOUTS[name]
    other = run_ranks(world, train, laid_out(base, world, options, tmp_path))[0]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5)
    assert other["weights"].keys() == one["weights"].keys()
    for weight, value in one["weights"].items():
        # AdamW divides by the gradient's size: where that is near 0, rounding decides the update's sign.
        np.testing.assert_allclose(other["weights"][weight], value, atol=2e-3, err_msg=weight)


def test_overlapped_communication_changes_nothing(
    reference: tuple[AnyMALConfig, dict[str, Any]], tmp_path: Path
) -> None:
    base, one = reference
    config = laid_out(base, 2, {}, tmp_path)
    config.model.ddp.overlap_grad_reduce = config.model.ddp.overlap_param_gather = True
    # Small buckets: several reductions are under way at once.
    config.model.ddp.bucket_size = 1000
    np.testing.assert_allclose(run_ranks(2, train, config)[0]["losses"], one["losses"], rtol=1e-5)
