"""A frozen base model of real Float8Tensors, on the CPU: what the trainer reads, gathers, adapts, saves and counts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from te_emulation import MARKS, install
from tiny import LLAMA, make_config

from benchmarks.measuring import PeakMemory, storages, stored_bytes
from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.model import unsharded_weights
from megatron_anymal.model.lora import merge_lora, merged_weights
from megatron_anymal.model.quantized_weights import is_quantized, stored_tensors
from megatron_anymal.model.unsharded_weights import gather_weights, hash_weights, list_weights, load_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build

pytestmark = MARKS
LINEARS = 16


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """Sizes that are multiples of 16, as FP8 needs them."""
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.precision, config.trainer.max_steps = "bf16", 2
    config.model.language_model.config = LLAMA | {"hidden_size": 128, "intermediate_size": 352}
    return config


def states(config: RunConfig, tp: int = 1, **lora: Any) -> tuple[TrainState, TrainState]:
    """The run with the local layers in bf16, and with Transformer Engine's whose matrices are held in FP8."""
    config = copy.deepcopy(config)
    config.trainer.devices = config.model.tensor_model_parallel_size = tp
    config.model.lora = LoraConfig(**lora)
    layout = initialize(config)
    install()
    plain = build(config, layout)
    config.model.transformer_impl, config.model.fp8 = "transformer_engine", "hybrid"
    config.model.fp8_primary_weights = True
    held = build(config, layout)
    assert sum(is_quantized(p) for p in held.models[0].parameters()) == LINEARS
    assert not any(is_quantized(p) for p in plain.models[0].parameters())
    return plain, held


def hashes(config: RunConfig, tp: int) -> list[str]:
    plain, held = states(config, tp)
    whole: list[Any] = [gather_weights(plain.models)]
    torch.distributed.broadcast_object_list(whole)
    weight_hashes = [hash_weights(state.models, "language_model.") for state in (plain, held)]
    load_weights(held.models, whole[0])
    weight_hashes.append(hash_weights(held.models, "language_model."))
    quantized = [p for p in held.models[0].parameters() if is_quantized(p)]
    quantized[5]._data[3, 1] ^= 1
    return [*weight_hashes, hash_weights(held.models, "language_model.")]


@pytest.mark.parametrize("tp", [1, 2])
def test_its_hash_is_that_of_the_values_it_was_made_from(config: RunConfig, tp: int) -> None:
    for bf16, drawn, loaded, changed in run_ranks(tp, hashes, config, tp):
        assert bf16 == drawn == loaded != changed


def hashed_while_built(config: RunConfig) -> tuple[int, int]:
    """Number of weights hashed while a run with drawn weights is built, and for its hash."""
    hash_weight, hashed = unsharded_weights.hash_weight, []
    unsharded_weights.hash_weight = lambda name, whole: hashed.append(name) or hash_weight(name, whole)
    _, held = states(config)
    built = len(hashed)
    for _ in range(2):
        hash_weights(held.models, "language_model.decoder.layers.0.self_attention.linear_")
    return built, len(hashed) - built


def test_drawn_weights_are_hashed_when_their_hash_is_asked_for(config: RunConfig) -> None:
    # The fused norm keeps no hash and is hashed both times.
    assert run_ranks(1, hashed_while_built, config) == [(0, 2)]


def gathered(config: RunConfig, tp: int) -> tuple[Any, Any]:
    plain, held = states(config, tp)
    weights = [w for w in list_weights(held.models[0]) if is_quantized(w.parameter)]
    alone = {w.name: w.gather() for w in weights}
    everything = gather_weights(held.models, "language_model.decoder.")
    originals = gather_weights(plain.models, "language_model.decoder.")
    assert {type(t) for t in alone.values()} == {torch.Tensor}
    if everything is None or originals is None:
        return None, None
    assert all(torch.equal(everything[name], tensor) for name, tensor in alone.items())
    return (
        {name: originals[name].float().numpy() for name in alone},
        {name: tensor.float().numpy() for name, tensor in alone.items()},
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_whole_weights_are_its_values_rounded_to_fp8(config: RunConfig, tp: int) -> None:
    originals, weights = run_ranks(tp, gathered, config, tp)[0]
    assert len(weights) == LINEARS
    for name, original in originals.items():
        # e4m3 has 3 bits of mantissa, and below the smallest normal number steps of 2 ** -9 of the largest / 448.
        step = np.abs(original).max() / 448 * 2**-9
        np.testing.assert_allclose(weights[name], original, rtol=2**-4 + 2**-8, atol=step, err_msg=name)
        assert (weights[name] != original).any()


def adapted(config: RunConfig, tp: int) -> tuple[list[str], Any, Any, Any]:
    """Classes of the adapters, and whole weights with adapters: of the FP8 base, of a plain base of the same values,
    and of the FP8 base after they were merged into it."""
    plain, held = states(config, tp, r=2, alpha=4.0)
    whole: list[Any] = [gather_weights(held.models)]
    torch.distributed.broadcast_object_list(whole)
    generator = torch.Generator().manual_seed(1)
    for name in whole[0]:
        if ".lora." in name:
            whole[0][name] = torch.randn(whole[0][name].shape, generator=generator).to(torch.bfloat16)
    load_weights(held.models, whole[0])
    whole = [gather_weights(held.models)]
    torch.distributed.broadcast_object_list(whole)
    load_weights(plain.models, whole[0])
    adapters = [p for n, p in held.models[0].named_parameters() if ".lora." in n]
    merged = [
        {name: value.float().numpy() for name, value in merged_weights(state.models, "language_model.")}
        for state in (held, plain)
    ]
    merge_lora(held.models)
    left = {w.name: w.gather().float().numpy() for w in list_weights(held.models[0]) if is_quantized(w.parameter)}
    return [type(p).__name__ for p in adapters], *merged, left


@pytest.mark.parametrize("tp", [1, 2])
def test_adapters_on_it_are_plain_and_merge(config: RunConfig, tp: int) -> None:
    for classes, held, plain, left in run_ranks(tp, adapted, config, tp):
        assert set(classes) == {"Parameter"} and len(classes) == 4 * 7 * 2
        assert held.keys() == plain.keys() and len(left) == LINEARS
        for name, value in held.items():
            np.testing.assert_array_equal(value, plain[name], err_msg=name)
        for name, value in left.items():
            np.testing.assert_allclose(value, held[name], rtol=2**-4 + 2**-8, atol=np.abs(value).max() / 448 * 2**-9)


def counted(config: RunConfig) -> tuple[dict[str, int], dict[str, int], int, int]:
    """Bytes by kind of both runs, elements held in FP8, and bytes by which a transposed copy raises the peak."""
    plain, held = states(config)
    kinds = [stored_bytes(s.models[0], s.wrapped[0], s.optimizer) for s in (plain, held)]
    quantized: list[Any] = [p for p in held.models[0].parameters() if is_quantized(p)]
    before = sum(storages(quantized).values())
    quantized[0].update_usage(columnwise_usage=True)
    assert sum(storages(quantized).values()) - before == quantized[0].numel()
    quantized[0].update_usage(rowwise_usage=True, columnwise_usage=False)
    assert sum(storages(quantized).values()) == before
    assert all(t.untyped_storage().nbytes() for p in quantized for t in stored_tensors(p))
    with PeakMemory() as memory:
        copied = quantized[0].detach().clone()
    assert is_quantized(copied)
    return kinds[0], kinds[1], sum(p.numel() for p in quantized), memory.peak - quantized[0].numel()


def test_bytes_are_those_of_the_fp8_values(config: RunConfig) -> None:
    [(plain, held, elements, beyond)] = run_ranks(1, counted, config)
    # One byte instead of two, and a scale of four bytes per matrix; everything else is the same.
    assert plain["weights"] - held["weights"] == elements - 4 * LINEARS
    assert all(plain[kind] == held[kind] for kind in plain if kind != "weights")
    assert 0 <= beyond < 16
