"""Runs with Transformer Engine's own modules on the CPU: against the local layers, resumed, and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import losses
from export_server import run_in_rank
from ranks import run_ranks
from safetensors.torch import load_file
from te_emulation import MARKS, install
from tiny import LLAMA, make_config, make_conversations
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools import export_hf
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.model.quantized_weights import is_quantized
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.loop import fit
from megatron_anymal.train.step import train_step

pytestmark = MARKS
LARGER = LLAMA | {"hidden_size": 128, "intermediate_size": 352}


@pytest.fixture
def config(tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """An SFT run with adapters on a Llama of a HuggingFace folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LARGER)).save_pretrained(tmp_path / "llama")
    data = make_conversations(tmp_path / "data", tokenizer_folder, 24)
    config = make_config(data, tokenizer_folder, tmp_path / "run")
    config.job, config.data.seq_length, config.trainer.max_steps = "sft", 96, 4
    config.model.language_model.config, config.model.language_model.path = {}, str(tmp_path / "llama")
    config.model.lora = LoraConfig(r=4, alpha=8.0)
    config.exp_manager.checkpoint.every_n_train_steps = 2
    return config


def run(
    config: RunConfig, model: dict[str, Any], look: Callable[[TrainState], Any] | None = None
) -> tuple[list[float], Any]:
    """In a rank: train with settings of the model that are refused without a GPU; return the losses, and the result of
    `look` at the end."""
    layout = initialize(config)
    install()
    for key, value in model.items():
        setattr(config.model, key, value)
    state = build(config, layout)
    fit(state, config.run_dir)
    return losses(config.run_dir), look(state) if look else None


ENGINE = {"transformer_impl": "transformer_engine"}
FP8 = ENGINE | {"fp8": "hybrid", "fp8_primary_weights": True}


@pytest.mark.parametrize("tp", [1, 2])
def test_its_layers_train_like_the_local_ones(config: RunConfig, tp: int, tmp_path: Path) -> None:
    config.trainer.devices = config.model.tensor_model_parallel_size = tp
    run_losses = []
    for name, model in (("local", {}), ("engine", ENGINE)):
        config.exp_manager.explicit_log_dir = str(tmp_path / name)
        run_losses.append(run_ranks(tp, run, copy.deepcopy(config), model)[0][0])
    np.testing.assert_allclose(run_losses[1], run_losses[0], rtol=1e-5)
    assert run_losses[0][0] != run_losses[0][-1]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_run_on_an_fp8_base_follows_bf16_and_resumes(config: RunConfig, recipe: str, tmp_path: Path) -> None:
    config.trainer.precision = "bf16"
    run_losses: dict[str, list[float]] = {}
    for name, model in (("bf16", ENGINE), ("whole", FP8 | {"fp8_recipe": recipe})):
        config.exp_manager.explicit_log_dir = str(tmp_path / name)
        run_losses[name] = run_ranks(1, run, copy.deepcopy(config), model)[0][0]
    np.testing.assert_allclose(run_losses["whole"], run_losses["bf16"], rtol=2e-2)
    config.exp_manager.explicit_log_dir = str(tmp_path / "resumed")
    for last in (2, 4):
        config.trainer.max_steps, config.model.optim.sched.decay_steps = last, 4
        resumed = run_ranks(1, run, copy.deepcopy(config), FP8 | {"fp8_recipe": recipe})[0][0]
    assert resumed == run_losses["whole"]
    stored = StreamReader(store.resolve(config.exp_manager.explicit_log_dir))
    # Nothing of the base, and of the scaling only data.
    assert not any(name.startswith("language_model.") and ".lora." not in name for name in stored.tensors)
    assert bool([name for name in stored.objects if "fp8_scaling" in name])


def transposes(state: TrainState) -> list[list[bool]]:
    """Which weights have a transposed copy, layer by layer during another step's backward passes, and at its end."""
    model: Any = state.models[0]
    quantized: list[Any] = [p for p in model.parameters() if is_quantized(p)]
    seen = []

    def note(module: Any, *ignored: Any) -> None:
        seen.append([p._transpose is not None for p in quantized])

    for module in model.modules():
        if is_quantized(getattr(module, "weight", None)):
            # Before the hook that drops the copy.
            module.register_full_backward_hook(note, prepend=True)
    data = state.train_data
    read = steps(data.planner, data.reader, replica=0, start=1, stop=2, num_workers=0, prefetch_steps=1)
    train_step(state, *next(iter(read)))
    return [*seen, [p._transpose is not None for p in quantized]]


def test_one_transposed_copy_at_a_time(config: RunConfig) -> None:
    config.trainer.precision, config.trainer.max_steps = "bf16", 1
    [(_, [*during, after])] = run_ranks(1, run, config, FP8, transposes)
    assert during and len(during) % 16 == 0 and all(sum(one) == 1 for one in during) and not any(after)


def test_a_run_on_an_fp8_base_exports_the_base_it_was_made_from(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.precision = "bf16"
    config.model.optim.lr = 3e-2
    run_ranks(1, run, config, FP8)
    out = tmp_path / "exported"
    words = ["--checkpoint", config.exp_manager.explicit_log_dir, "--out", str(out), "--llama-only"]
    assert run_in_rank(export_hf.main, words) == 0
    words[3] = str(tmp_path / "apart")
    assert run_in_rank(export_hf.main, [*words, "--adapter", "separate"]) == 0
    exported_weights, base = load_file(out / "model.safetensors"), load_file(tmp_path / "llama" / "model.safetensors")
    adapters = load_file(tmp_path / "apart" / "adapter" / "adapter_model.safetensors")
    for name, tensor in base.items():
        a, b = (adapters.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        expected = tensor.to(torch.bfloat16)
        if a is not None and b is not None:
            assert b.any(), name
            expected = (expected.float() + 2 * b.float() @ a.float()).to(torch.bfloat16)
        torch.testing.assert_close(
            exported_weights[name], expected, rtol=2**-7, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
