"""Test the reference: its Llama against transformers, and the whole model against the engine on one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import make_config, make_shards
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_anymal.config import RunConfig
from megatron_anymal.model.hf_llama import from_hf
from megatron_anymal.model.unsharded_weights import gather_weights, list_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.step import train_step
from parity.objective import backward
from parity.reference import Reference, Trace, run_reference
from parity.samples import Sample

STEPS = 3
LLAMA: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMAS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "gqa": {"num_key_value_heads": 2},
    "gqa-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "wide-heads-llama3-rope": {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {**ROPE, "original_max_position_embeddings": 16},
    },
}


def relative(values: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference, relative to the norm of the expected values."""
    return float(np.linalg.norm(values - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))


@pytest.mark.parametrize("name", LLAMAS)
def test_the_llama_matches_transformers(name: str) -> None:
    torch.manual_seed(0)
    hf = LlamaConfig(**{**LLAMA, **LLAMAS[name]})
    theirs = LlamaForCausalLM._from_config(hf, attn_implementation="sdpa").double()
    for weight_name, weight in theirs.named_parameters():
        if "norm" in weight_name:
            # Norm weights start at 1, which would hide a missing or swapped norm.
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    names = [n for n in ours_of(hf) if not (hf.tie_word_embeddings and "output_layer" in n)]
    weights = {n: from_hf(n, hf, theirs.get_parameter) for n in names}
    ours = Reference(RunConfig(), hf, weights, names, torch.float64)

    tokens = torch.randint(0, hf.vocab_size, (40,))
    labels, mask = tokens.roll(-1), (torch.rand(40) < 0.7).float()
    mask[-1] = 0
    sample = Sample(tokens, labels, mask, {}, {})
    # The norms in transformers always compute in single precision.
    logits = theirs(tokens[None]).logits[0]
    assert relative(ours(sample).detach().numpy(), logits.detach().numpy()) < 1e-6
    wanted = torch.nn.functional.cross_entropy(logits, torch.where(mask > 0, labels, -100))
    wanted.backward()
    assert backward(ours, RunConfig(), [sample], None) == pytest.approx(wanted.item(), rel=1e-6)
    gradients: dict[str, Any] = {n: p.grad for n, p in theirs.named_parameters()}
    for n, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert relative(parameter.grad.numpy(), from_hf(n, hf, gradients.__getitem__).numpy()) < 1e-5, n


def ours_of(hf: LlamaConfig) -> list[str]:
    """Full names of a Llama's weights."""
    rest = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    layer = [f"{part}.weight" for part in (*rest, "input_layernorm", "pre_mlp_layernorm")]
    layers = [f"decoder.layers.{number}.{part}" for number in range(hf.num_hidden_layers) for part in layer]
    around = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")
    return [f"language_model.{name}" for name in (*layers, *around)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> RunConfig:
    """Samples with an image, audio, IMU data, an image and audio, or only text."""
    folder = tmp_path_factory.mktemp("reference")
    shards = make_shards(folder / "shards", tokenizer_folder, 40, ("image", "audio", "imu", "mixed", "text"))
    config = make_config(shards, tokenizer_folder, folder / "run")
    # More than one layer, so that the operations between layers are compared too.
    config.model.modalities["image"].projector.num_layers = 2
    config.model.modalities["audio"].projector.num_layers = 2
    # Two encoder inputs per audio item.
    config.model.modalities["audio"].options["piece_seconds"] = 0.25
    config.model.optim.sched.warmup_steps = 2
    return config


def trained_llama(config: RunConfig) -> None:
    config.model.language_model.freeze = False


def tied_head(config: RunConfig) -> None:
    trained_llama(config)
    config.model.language_model.config["tie_word_embeddings"] = True


def weight_decay(config: RunConfig) -> None:
    trained_llama(config)
    config.model.optim.weight_decay = 0.3


def no_clipping(config: RunConfig) -> None:
    trained_llama(config)
    config.trainer.gradient_clip_val = 0.0


def batches_without_some_modalities(config: RunConfig) -> None:
    config.model.global_batch_size = 2


CASES: dict[str, Callable[[RunConfig], None]] = {
    "frozen": lambda config: None,
    "trained": trained_llama,
    "tied-head": tied_head,
    "weight-decay": weight_decay,
    "no-clipping": no_clipping,
    "missing-modalities": batches_without_some_modalities,
}


def whole(state: TrainState) -> dict[str, np.ndarray]:
    """Copies of all unsharded weights."""
    weights = gather_weights(state.models)
    assert weights is not None
    return {name: w.numpy().copy() for name, w in weights.items()}


def run_engine(config: RunConfig) -> tuple[dict[str, np.ndarray], Trace]:
    """Run the engine in a rank process. Return all unsharded initial weights and a record of the run."""
    state = build(config, initialize(config))
    start, losses = whole(state), []
    gradients: list[dict[str, np.ndarray]] = []
    weights: list[Any] = [weight for model in state.models for weight in list_weights(model)]
    training = {weight.name: weight for weight in weights if weight.parameter.requires_grad}
    optimizer: Any = state.optimizer
    update = optimizer.step

    def recorded_update() -> Any:
        gradients.append({name: w.gather(w.parameter.main_grad).numpy().copy() for name, w in training.items()})
        return update()

    optimizer.step = recorded_update
    for step in range(STEPS):
        plan = state.train_data.planner.plan(step)
        batches = [state.train_data.reader[planned] for planned in plan.of_replica(0)]
        losses.append(train_step(state, plan, batches).loss)
    after = whole(state)
    return start, Trace(losses, gradients, {name: after[name] for name in training})


@pytest.mark.parametrize("case", CASES)
def test_the_engine_matches_on_one_process(base: RunConfig, case: str) -> None:
    config = copy.deepcopy(base)
    CASES[case](config)
    start, engine = run_ranks(1, run_engine, config)[0]
    # Measured rounding: losses 7e-8, gradients 7e-6 (2e-8 absolute if a sum cancels, as for a projector's `gain`),
    # updates 4e-5.
    for dtype in (torch.float32, torch.float64):
        wanted = run_reference(config, start, set(engine.weights), STEPS, dtype)
        np.testing.assert_allclose(engine.losses, wanted.losses, rtol=1e-6)
        for step, (engine_gradients, gradients) in enumerate(zip(engine.gradients, wanted.gradients, strict=True)):
            assert engine_gradients.keys() == gradients.keys()
            for name, gradient in gradients.items():
                allowed = 3e-5 * np.linalg.norm(gradient) + 1e-7
                assert np.linalg.norm(engine_gradients[name] - gradient) < allowed, f"step {step}: {name}"
        for name, weight in wanted.weights.items():
            assert relative(engine.weights[name] - start[name], weight - start[name]) < 5e-4, name
