"""An FP8 base model, with a stand-in for Transformer Engine's tensors, which need a GPU."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import train
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from ranks import run_ranks
from tiny import make_config
from torch import nn

from checkpoint_tools.verifying.native_logits import _on_one_process
from megatron_anymal.checkpoint.state import read_language_model
from megatron_anymal.checkpoint.store import resolve
from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.model.fp8_weights import drop_transposes
from megatron_anymal.model.lora import add_lora, merged_weights
from megatron_anymal.model.quantized_weights import leave_out_quantization
from megatron_anymal.model.unsharded_weights import gather_weights, hash_weights, list_weights, load_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build


class Quantized(nn.Parameter):
    """FP8 values stored as floats, with only those methods of Transformer Engine's tensors that the trainer calls.

    As there, tensors made like it are of its class, and without `dequantize` its values cannot be read.
    """

    transposed = False

    def new_zeros(self, *shape: int, **settings: Any) -> Quantized:  # type: ignore[override]
        return Quantized(torch.zeros(*shape), requires_grad=False)

    def contiguous(self, *args: Any) -> torch.Tensor:  # type: ignore[override]
        raise AssertionError("a quantized tensor's own bytes were about to be read")

    to = detach = contiguous

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        return self.data

    def copy_(self, source: torch.Tensor, *args: Any) -> torch.Tensor:  # type: ignore[override]
        assert source.shape == self.shape, "must be quantized whole: one scale per tensor"
        scale = 448 / source.abs().max().float()
        self.data.copy_((source.float() * scale).to(torch.float8_e4m3fn).float() / scale)
        return self

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        self.transposed = bool(columnwise_usage)

    def get_data_tensors(self, rowwise_data: bool, columnwise_data: bool) -> torch.Tensor:
        assert rowwise_data and not columnwise_data
        return self.data


def quantize_layers(model: Any) -> list[Quantized]:
    """Replace the layers' matrices by stand-ins."""
    weights = []
    for module in model.language_model.decoder.layers.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            weight = Quantized(module.weight.data.clone(), requires_grad=False)
            weight.__dict__.update(vars(module.weight))
            module.weight = weight
            weights.append(weight)
    return weights


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.max_steps = 2
    return config


def compare_hashes(config: RunConfig, tp: int) -> list[str]:
    """Hashes of the base model: unquantized, in FP8, and in FP8 with one value changed."""
    config.trainer.devices = config.model.tensor_model_parallel_size = tp
    state = build(config, initialize(config))
    whole: Any = [gather_weights(state.models)]
    torch.distributed.broadcast_object_list(whole)
    hashes = [hash_weights(state.models, "language_model.")]
    quantized = quantize_layers(state.models[0])
    load_weights(state.models, whole[0])
    hashes.append(hash_weights(state.models, "language_model."))
    held = {weight.name: weight.gather() for weight in list_weights(state.models[0])}
    rounded = [name for name, tensor in whole[0].items() if not torch.equal(held[name], tensor)]
    assert len(quantized) == len(rounded) == 16
    sources = gather_weights(state.models, from_sources=True)
    assert sources is None or all(torch.equal(sources[name], tensor) for name, tensor in whole[0].items())
    quantized[5].data[3, 1] += 0.5
    with pytest.raises(ValueError, match="have changed") if torch.distributed.get_rank() == 0 else nullcontext():
        gather_weights(state.models, from_sources=True)
    return [*hashes, hash_weights(state.models, "language_model.")]


@pytest.mark.parametrize("tp", [1, 2])
def test_its_hash_is_that_of_the_values_it_was_made_from(config: RunConfig, tp: int) -> None:
    for original, quantized, changed in run_ranks(tp, compare_hashes, config, tp):
        assert original == quantized != changed


def backward(config: RunConfig) -> list[list[bool]]:
    """Which weights have a transposed copy, layer by layer during the backward pass, and at the end."""
    state = build(config, initialize(config))
    model = state.models[0]
    quantized = quantize_layers(model)
    drop_transposes(model)
    seen = []

    def made(module: Any, gradients: Any) -> None:
        # As Transformer Engine does on demand.
        module.weight.transposed = True
        seen.append([weight.transposed for weight in quantized])

    for module in model.language_model.decoder.layers.modules():
        if isinstance(getattr(module, "weight", None), Quantized):
            module.register_full_backward_pre_hook(made)
    plan = state.train_data.planner.plan(0)
    read = state.train_data.reader[plan.of_replica(0)[0]]
    state.wrapped[0](read, labels=read.labels).sum().backward()
    return [*seen, [weight.transposed for weight in quantized]]


def test_one_transposed_copy_at_a_time(config: RunConfig) -> None:
    *during, after = run_ranks(1, backward, config)[0]
    assert len(during) == 16 and all(sum(one) == 1 for one in during) and not any(after)


def read_back(config: RunConfig, folder: Path, tp: int) -> dict[str, Any]:
    """Weights of a differently initialized Llama after reading those of a checkpoint."""
    config.trainer.devices = config.model.tensor_model_parallel_size = tp
    config.model.seed += 1
    state = build(config, initialize(config))
    read_language_model(list_weights(state.models[0]), resolve(str(folder)))
    weights = gather_weights(state.models, "language_model.")
    return {name: tensor.numpy() for name, tensor in (weights or {}).items()}


@pytest.mark.parametrize("tp", [1, 2])
def test_a_base_read_weight_by_weight(config: RunConfig, tp: int) -> None:
    config.model.language_model.freeze = False
    # Not a multiple of two, so the padding rows differ between layouts.
    config.model.language_model.config["vocab_size"] = 33
    trained = run_ranks(1, train, copy.deepcopy(config))[0]["weights"]
    weights = run_ranks(tp, read_back, config, Path(config.exp_manager.explicit_log_dir), tp)[0]
    assert weights and all((trained[name] == weight).all() for name, weight in weights.items())


def scaled(linear: Any) -> None:
    """Give a linear layer a scaling state that changes with every use, like Transformer Engine's."""
    linear.fp8_meta, linear.uses = {}, 0
    linear.register_forward_hook(lambda module, *ignored: setattr(module, "uses", module.uses + 1))


def run_scaled(config: RunConfig) -> dict[str, int]:
    """Train with stand-ins for scaled linear layers; return their final states."""
    import megatron_anymal.train.build as train_build

    original = train_build.build_models

    def build_models(*args: Any) -> Any:
        models = original(*args)
        for number, linear in enumerate(models[0].language_model.decoder.layers.modules()):
            if isinstance(linear, (ColumnParallelLinear, RowParallelLinear)):
                scaled(linear)
                linear.uses = 1000 * number
        return models

    train_build.build_models = build_models
    for kind in (ColumnParallelLinear, RowParallelLinear):
        # As in Transformer Engine: the bytes of a pickle, with the recipe.
        kind.get_extra_state = lambda self: torch.frombuffer(
            bytearray(pickle.dumps({"recipe": print, "uses": getattr(self, "uses", 0)})), dtype=torch.uint8
        )
        kind.set_extra_state = lambda self, state: (
            setattr(self, "uses", pickle.loads(state.numpy().tobytes())["uses"]) if state is not None else None
        )

    def look(state: TrainState) -> dict[str, int]:
        modules = state.models[0].language_model.decoder.layers.named_modules()
        return {name: module.uses for name, module in modules if hasattr(module, "uses")}

    return train(config, look)["seen"]


def test_its_scaling_continues_with_the_run(config: RunConfig, tmp_path: Path) -> None:
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir = str(tmp_path / "whole")
    whole.trainer.max_steps = 4
    undisturbed = run_ranks(1, run_scaled, whole)[0]
    for steps in (2, 4):
        config.trainer.max_steps, config.model.optim.sched.decay_steps = steps, 4
        resumed = run_ranks(1, run_scaled, copy.deepcopy(config))[0]
    assert len(undisturbed) == 16 and len(set(undisturbed.values())) == 16
    assert resumed == undisturbed


def adapted(config: RunConfig, tp: int) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Classes of the adapters on a quantized base, its merged weights, and those of a plain base of the same values."""
    config.trainer.devices = config.model.tensor_model_parallel_size = tp
    state = build(config, initialize(config))
    [model] = state.models
    for weight in quantize_layers(model):
        weight.copy_(weight.data)
    add_lora([model], LoraConfig(r=2, alpha=4.0))
    adapters: Any = {n: p for n, p in model.named_parameters() if ".lora." in n}
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    merged = {name: value.numpy() for name, value in merged_weights([model])}
    for module in model.language_model.decoder.layers.modules():
        if isinstance(getattr(module, "weight", None), Quantized):
            plain: Any = nn.Parameter(module.weight.data, requires_grad=False)
            plain.__dict__.update(vars(module.weight))
            module.weight = plain
    return (
        [type(p).__name__ for p in adapters.values()],
        merged,
        {name: value.numpy() for name, value in merged_weights([model])},
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_adapters_on_it_are_plain_and_merge(config: RunConfig, tp: int) -> None:
    classes, merged, of_plain = run_ranks(tp, adapted, config, tp)[0]
    assert len(classes) > 10 and set(classes) == {"Parameter"}
    assert merged.keys() == of_plain.keys()
    for name, value in merged.items():
        np.testing.assert_array_equal(value, of_plain[name], err_msg=name)


def test_answers_and_exports_leave_it_out() -> None:
    """Also without Transformer Engine, which a machine that exports need not have."""
    config = RunConfig()
    config.model.fp8, config.model.fp8_recipe, config.model.fp8_primary_weights = "hybrid", "delayed", True
    config.model.transformer_impl = "transformer_engine"
    verified = _on_one_process(config).model
    leave_out_quantization(config.model)
    for model in (config.model, verified):
        assert (model.fp8, model.fp8_recipe, model.fp8_primary_weights) == ("", "tensorwise", False)
        assert model.transformer_impl == "auto"
    config.model.transformer_impl = "local"
    leave_out_quantization(config.model)
    assert config.model.transformer_impl == "local"
