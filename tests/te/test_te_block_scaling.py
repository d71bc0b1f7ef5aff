"""MXFP8 and NVFP4: the recipes, refusals and sizes of Transformer Engine's own classes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from te_emulation import MARKS, install
from tiny import LLAMA

from megatron_anymal import backend
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.parallel import initialize

pytestmark = MARKS
WAYS: dict[str, dict[str, Any]] = {"MXFP8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"}, "NVFP4": {"fp4": "e2m1"}}


def configured(way: str) -> RunConfig:
    config = RunConfig()
    config.trainer.precision, config.data.tokenizer = "bf16", "unused"
    config.model.language_model.config = LLAMA | {"hidden_size": 128, "intermediate_size": 384}
    initialize(config)
    install()
    for key, value in WAYS[way].items():
        setattr(config.model, key, value)
    return config


def recipe_of(way: str) -> tuple[str, str]:
    """Class and number format of the recipe with which megatron-core runs the layers."""
    from megatron.core.fp4_utils import get_fp4_recipe
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_anymal.model.llama import transformer_config
    from megatron_anymal.model.llama_shape import read_llama_config

    config = configured(way)
    transformer = transformer_config(config.model, "bf16", read_llama_config(config.model.language_model))
    recipe = get_fp4_recipe(transformer) if transformer.fp4 else get_fp8_recipe(transformer)
    return type(recipe).__name__, (recipe.fp4_format if transformer.fp4 else recipe.fp8_format).name


def test_megatron_core_hands_on_the_recipe() -> None:
    assert run_ranks(1, recipe_of, "MXFP8") == [("MXFP8BlockScaling", "E4M3")]
    assert run_ranks(1, recipe_of, "NVFP4") == [("NVFP4BlockScaling", "E2M1")]


def answered(way: str, capability: tuple[int, int]) -> str:
    """Refusal on a GPU of this capability, or ""."""
    from transformer_engine.pytorch import quantization, utils

    config = configured(way)
    capabilities = dataclasses.replace(
        backend.capabilities(), cuda_devices=("a GPU",), compute_capability=capability, transformer_engine="2.11"
    )
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: SimpleNamespace(major=capability[0], minor=capability[1])
    for cached in (
        quantization.check_mxfp8_support,
        quantization.check_nvfp4_support,
        utils._get_device_compute_capability,
    ):
        cached.cache_clear()
    backend.capabilities = lambda: capabilities
    backend._transformer_engine = lambda has_cuda: ("2.11", "")
    try:
        backend.check_backend(config.model, "bf16")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("way", "capability", "says"),
    [
        ("MXFP8", (9, 0), "needs a GPU with MXFP8"),
        ("MXFP8", (10, 0), ""),
        (
            "MXFP8",
            (12, 0),
            "refused by Transformer Engine 2.11: MXFP8 (for all gemm layouts) is not supported on 12.0+",
        ),
        ("NVFP4", (9, 0), "needs a GPU with NVFP4"),
        ("NVFP4", (10, 0), ""),
        ("NVFP4", (12, 0), ""),
    ],
)
def test_what_transformer_engine_refuses(way: str, capability: tuple[int, int], says: str) -> None:
    [refusal] = run_ranks(1, answered, way, capability)
    assert says in refusal and bool(says) == bool(refusal), refusal


def quantizable(way: str) -> list[bool]:
    """Whether matrices can be quantized: of the required multiple, and of half of it in either dimension."""
    import transformer_engine_torch as compiled
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    size = configured(way).model.product_multiple
    quantizer = MXFP8Quantizer(compiled.DType.kFloat8E4M3) if way == "MXFP8" else NVFP4Quantizer()
    sizes = ((size, size), (size // 2, size), (size, size // 2))
    return [quantizer.is_quantizable(torch.empty(*one)) for one in sizes]


@pytest.mark.parametrize("way", WAYS)
def test_sizes_are_multiples_of_the_blocks(way: str) -> None:
    assert run_ranks(1, quantizable, way) == [[True, False, False]]
