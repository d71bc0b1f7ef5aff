"""The Llama and the projectors built from Transformer Engine's own modules: names, shapes, types, split dimensions."""

from __future__ import annotations

import inspect
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from te_emulation import MARKS, install
from tiny import LLAMA

from megatron_anymal.config import RunConfig
from megatron_anymal.parallel import initialize

pytestmark = MARKS
# FP8 needs sizes that are multiples of 16.
LARGER = LLAMA | {"hidden_size": 128, "intermediate_size": 352}
Described = dict[str, tuple[Any, ...]]


def join(tp: int, *, sequence_parallel: bool = False) -> RunConfig:
    """Join the job; return a configuration with which the Llama can be built."""
    config = RunConfig()
    config.trainer.precision, config.trainer.devices = "bf16", tp
    config.model.tensor_model_parallel_size, config.model.sequence_parallel = tp, sequence_parallel
    config.model.language_model.config = dict(LARGER)
    config.data.tokenizer = "unused"
    initialize(config)
    install()
    return config


def llama(config: RunConfig, implementation: str, **fp8: Any) -> Any:
    """Build the Llama as a part of a model, for its list of weights."""
    from megatron_anymal.model.llama import build_gpt, transformer_config
    from megatron_anymal.model.llama_shape import read_llama_config

    for key, value in fp8.items():
        setattr(config.model, key, value)
    hf = read_llama_config(config.model.language_model)
    gpt = build_gpt(hf, transformer_config(config.model, "bf16", hf), implementation)
    model: Any = torch.nn.Module()
    model.language_model, model.vocab_size, model.discrete = gpt, hf.vocab_size, SimpleNamespace(added=0)
    return model


def described(model: Any) -> Described:
    from megatron_anymal.model.unsharded_weights import list_weights

    return {
        w.name: (
            w.shape,
            w.split_dim,
            w.blocks,
            w.rows,
            w.parameter.dtype,
            tuple(w.parameter.shape),
            bool(getattr(w.parameter, "sequence_parallel", False)),
        )
        for w in list_weights(model)
    }


def both(tp: int, sequence_parallel: bool) -> tuple[Described, Described, set[str]]:
    config = join(tp, sequence_parallel=sequence_parallel)
    local, engine = (llama(config, name) for name in ("local", "transformer_engine"))
    return described(local), described(engine), {type(m).__name__ for m in engine.modules()}


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_weights_are_those_of_the_local_layers(tp: int, sequence_parallel: bool) -> None:
    for local, engine, modules in run_ranks(tp, both, tp, sequence_parallel):
        assert engine == local and len(local) == 27
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TurnedAttention"} <= modules


def deterministic(set_to: str | None) -> set[bool]:
    os.environ.pop("NVTE_ALLOW_NONDETERMINISTIC_ALGO", None)
    if set_to is not None:
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = set_to
    model = llama(join(1), "transformer_engine")
    return {m.deterministic for m in model.modules() if type(m).__name__ == "TurnedAttention"}


@pytest.mark.parametrize(("set_to", "repeats"), [(None, True), ("0", True), ("1", False)])
def test_attention_repeats_unless_told_otherwise(set_to: str | None, repeats: bool) -> None:
    assert run_ranks(1, deterministic, set_to) == [{repeats}]


def quantized(recipe: str) -> tuple[Described, Described, list[str], set[str], set[bool]]:
    from megatron_anymal.model.quantized_weights import is_quantized

    config = join(1)
    plain = llama(config, "local")
    engine = llama(config, "transformer_engine", fp8="hybrid", fp8_recipe=recipe, fp8_primary_weights=True)
    fp8_parameters = {n: p for n, p in engine.named_parameters() if is_quantized(p)}
    return (
        described(plain),
        described(engine),
        sorted(fp8_parameters),
        {type(p).__name__ for p in fp8_parameters.values()},
        {p._transpose is None for p in fp8_parameters.values()},
    )


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_the_layers_matrices_are_held_in_fp8_alone(recipe: str) -> None:
    [(plain, engine, names, kinds, untransposed)] = run_ranks(1, quantized, recipe)
    assert engine == plain and kinds == {"Float8Tensor"}
    matrices = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    expected = [f"language_model.decoder.layers.{n}.{name}.weight" for n in range(4) for name in matrices]
    assert names == sorted(expected)
    # A transposed copy would be a second byte per weight.
    assert untransposed == {True}


def norm_linear(tp: int) -> tuple[Described, Described]:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_anymal.model.transformer_engine import NormLinear
    from megatron_anymal.model.unsharded_weights import leave_unset

    join(tp)
    parallel = ModelParallelConfig(tensor_model_parallel_size=tp, params_dtype=torch.bfloat16)
    plain: Any = torch.nn.Module()
    plain.linear = ColumnParallelLinear(64, 96, config=parallel, init_method=leave_unset)
    plain.norm = torch.nn.LayerNorm(64, dtype=torch.bfloat16)

    def parts(module: torch.nn.Module, names: dict[str, str]) -> Described:
        return {
            names.get(n, n): (
                tuple(p.shape),
                p.dtype,
                getattr(p, "tensor_model_parallel", False),
                p.partition_dim if getattr(p, "tensor_model_parallel", False) else None,  # type: ignore[attr-defined]
            )
            for n, p in module.named_parameters()
        }

    fused = {"weight": "linear.weight", "bias": "linear.bias"}
    fused |= {"layer_norm_weight": "norm.weight", "layer_norm_bias": "norm.bias"}
    return parts(NormLinear(64, 96, parallel), fused), parts(plain, {})


@pytest.mark.parametrize("tp", [1, 2])
def test_a_projectors_norm_and_linear_layer_are_those_of_two_modules(tp: int) -> None:
    for fused, plain in run_ranks(tp, norm_linear, tp):
        assert fused == plain


def test_attention_is_called_with_the_parameters_it_has() -> None:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    from megatron_anymal.model.transformer_engine import TurnedAttention

    base, ours = (list(inspect.signature(c.forward).parameters) for c in (TEDotProductAttention, TurnedAttention))
    assert ours[:-1] == base[: len(ours) - 1] and ours[-1] == "more"
