"""Choice of attention kernel by hardware and settings, and refusal of layouts that this machine cannot run."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_anymal import backend
from megatron_anymal.config import ConfigError, RunConfig

H100 = backend.Capabilities(("H100",), (9, 0), "", "it is not installed", "2.8", False, False, "", True, True)
BLACKWELL = dataclasses.replace(
    H100, cuda_devices=("B200",), compute_capability=(10, 0), transformer_engine="2.11.0", transformer_engine_problem=""
)
HOPPER = dataclasses.replace(BLACKWELL, cuda_devices=("H100",), compute_capability=(9, 0))
CPU = dataclasses.replace(H100, cuda_devices=(), compute_capability=None, fp8=False)


def machine(monkeypatch: pytest.MonkeyPatch, capabilities: backend.Capabilities) -> None:
    """Pretend that this machine has the given capabilities."""
    monkeypatch.setattr(backend, "capabilities", lambda: capabilities)
    monkeypatch.setattr(backend.torch.cuda, "is_available", lambda: bool(capabilities.cuda_devices))
    engine = (capabilities.transformer_engine, capabilities.transformer_engine_problem)
    monkeypatch.setattr(backend, "_transformer_engine", lambda has_cuda: engine)
    monkeypatch.setattr(backend, "version_of", lambda name: capabilities.flash_attn if name == "flash-attn" else "")


def config_with(**model: Any) -> RunConfig:
    """The default configuration with the given keys of `model` changed."""
    config = RunConfig()
    config.trainer.precision = model.pop("precision", "bf16")
    for key, value in model.items():
        setattr(config.model, key, value)
    return config


@pytest.mark.parametrize(
    ("capabilities", "model", "kernel"),
    [
        (CPU, {}, "sdpa"),
        (H100, {}, "flash_attn"),
        (H100, {"precision": "32"}, "flex"),
        (dataclasses.replace(H100, flash_attn=""), {}, "flex"),
        (H100, {"attention": "flex"}, "flex"),
        (dataclasses.replace(H100, transformer_engine="2.11"), {}, "transformer_engine"),
        (dataclasses.replace(H100, transformer_engine="2.11"), {"transformer_impl": "local"}, "flash_attn"),
    ],
)
def test_the_attention_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch, capabilities: backend.Capabilities, model: dict[str, Any], kernel: str
) -> None:
    machine(monkeypatch, capabilities)
    config = config_with(**model)
    backend.check_backend(config.model, config.trainer.precision)
    assert backend.attention_kernel(config.model, config.trainer.precision) == kernel


@pytest.mark.parametrize(
    ("capabilities", "model", "says"),
    [
        (CPU, {"attention": "flash_attn"}, r"model\.attention=flash_attn needs a CUDA device"),
        (CPU, {"attention": "flex"}, r"model\.attention=flex needs a CUDA device"),
        (dataclasses.replace(H100, flash_attn=""), {"attention": "flash_attn"}, "flash-attn is not installed"),
        (H100, {"attention": "flash_attn", "precision": "32"}, r"needs trainer\.precision=bf16"),
        (dataclasses.replace(H100, transformer_engine="2.11"), {"attention": "sdpa"}, "has no effect on Transformer"),
        (
            CPU,
            {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]},
            r"recompute_modules=\[layernorm\] needs Transformer Engine",
        ),
        (CPU, {"fp8": "hybrid"}, r"model\.fp8=hybrid needs Transformer Engine"),
    ],
)
def test_what_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capabilities: backend.Capabilities, model: dict[str, Any], says: str
) -> None:
    machine(monkeypatch, capabilities)
    config = config_with(**model)
    with pytest.raises(ConfigError, match=says):
        backend.check_backend(config.model, config.trainer.precision)


def engine_that_says(monkeypatch: pytest.MonkeyPatch, available: bool, reason: str) -> None:
    """Pretend that Transformer Engine is installed and gives this answer about MXFP8 and NVFP4."""
    asked = {f"is_{name}_available": lambda return_reason: (available, reason) for name in ("mxfp8", "nvfp4")}
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", SimpleNamespace(**asked))


MXFP8, NVFP4 = {"fp8": "e4m3", "fp8_recipe": "mxfp8"}, {"fp4": "e2m1"}


@pytest.mark.parametrize("model", [MXFP8, NVFP4])
def test_block_scaling_is_accepted_on_blackwell(monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]) -> None:
    machine(monkeypatch, BLACKWELL)
    engine_that_says(monkeypatch, True, "")
    config = config_with(**model)
    backend.check_backend(config.model, config.trainer.precision)


@pytest.mark.parametrize(
    ("capabilities", "model", "says"),
    [
        (HOPPER, MXFP8, r"model\.fp8_recipe=mxfp8 needs a GPU with MXFP8 .* 10\.0.*here it is 9\.0.*=tensorwise"),
        (HOPPER, NVFP4, r"model\.fp4=e2m1 needs a GPU with NVFP4 .* 10\.0.*here it is 9\.0.*set model\.fp4=''"),
        (H100, NVFP4, r"model\.fp4=e2m1 needs Transformer Engine, .*it is not installed"),
        (CPU, MXFP8, r"model\.fp8=e4m3 needs Transformer Engine"),
        (
            BLACKWELL,
            MXFP8,
            r"model\.fp8_recipe=mxfp8 is refused by Transformer Engine 2\.11\.0: not on 12\.0 yet",
        ),
        (BLACKWELL, NVFP4, r"model\.fp4=e2m1 is refused by Transformer Engine 2\.11\.0: not on 12\.0 yet"),
        (BLACKWELL, NVFP4 | {"transformer_impl": "local"}, r"model\.fp4=e2m1 has no effect with .*=local"),
    ],
)
def test_block_scaling_is_refused_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capabilities: backend.Capabilities, model: dict[str, Any], says: str
) -> None:
    machine(monkeypatch, capabilities)
    engine_that_says(monkeypatch, False, "not on 12.0 yet.")
    config = config_with(**model)
    with pytest.raises(ConfigError, match=says):
        backend.check_backend(config.model, config.trainer.precision)


@pytest.mark.parametrize("model", [MXFP8, NVFP4])
def test_block_scaling_needs_bf16(monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]) -> None:
    machine(monkeypatch, BLACKWELL)
    engine_that_says(monkeypatch, True, "")
    with pytest.raises(ConfigError, match=r"needs trainer\.precision=bf16"):
        backend.check_backend(config_with(**model).model, "32")


def test_nf4_has_layers_of_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, dataclasses.replace(H100, transformer_engine="2.11"))
    config = config_with(base_quantization="nf4")
    assert backend.transformer_impl(config.model) == "local"
    assert backend.attention_kernel(config.model, "bf16") == "flash_attn"


def test_bitsandbytes_is_missed_before_anything_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_with(base_quantization="nf4")
    monkeypatch.setattr(backend, "is_importable", lambda name: name != "bitsandbytes")
    with pytest.raises(ConfigError, match=r"base_quantization=nf4 needs bitsandbytes, which is not installed.*\[nf4\]"):
        backend.check_backend(config.model, "32")
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(backend, "is_importable", lambda name: True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"does not import here \(RuntimeError: built for another torch\)"):
        backend.check_backend(config.model, "32")


@pytest.mark.parametrize(("allowed", "repeats"), [("0", True), ("1", False), (None, False)])
def test_attention_that_may_differ_is_known(monkeypatch, allowed, repeats):
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    if allowed is not None:
        monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", allowed)
    assert backend.attention_repeats("transformer_engine") is repeats
    assert backend.attention_repeats("flash_attn") and backend.attention_repeats("sdpa")
