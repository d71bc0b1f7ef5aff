"""Choice of attention kernel by hardware and settings, and refusal of layouts that this machine cannot run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_anymal import backend
from megatron_anymal.config import ConfigError, RunConfig

H100 = backend.Capabilities(("H100",), (9, 0), "", "it is not installed", "2.8", False, False, "", True, True)
CPU = dataclasses.replace(H100, cuda_devices=(), compute_capability=None, fp8=False)


def machine(monkeypatch: pytest.MonkeyPatch, found: backend.Capabilities) -> None:
    """Pretend that this machine has the given capabilities."""
    monkeypatch.setattr(backend, "capabilities", lambda: found)
    monkeypatch.setattr(backend.torch.cuda, "is_available", lambda: bool(found.cuda_devices))
    engine = (found.transformer_engine, found.transformer_engine_problem)
    monkeypatch.setattr(backend, "_transformer_engine", lambda has_cuda: engine)
    monkeypatch.setattr(backend, "version_of", lambda name: found.flash_attn if name == "flash-attn" else "")


def config_with(**model: Any) -> RunConfig:
    """The default configuration with the given keys of `model` changed."""
    config = RunConfig()
    config.trainer.precision = model.pop("precision", "bf16")
    for key, value in model.items():
        setattr(config.model, key, value)
    return config


@pytest.mark.parametrize(
    ("found", "model", "kernel"),
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
    monkeypatch: pytest.MonkeyPatch, found: backend.Capabilities, model: dict[str, Any], kernel: str
) -> None:
    machine(monkeypatch, found)
    config = config_with(**model)
    backend.check_backend(config.model, config.trainer.precision)
    assert backend.attention_kernel(config.model, config.trainer.precision) == kernel


@pytest.mark.parametrize(
    ("found", "model", "says"),
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
    monkeypatch: pytest.MonkeyPatch, found: backend.Capabilities, model: dict[str, Any], says: str
) -> None:
    machine(monkeypatch, found)
    config = config_with(**model)
    with pytest.raises(ConfigError, match=says):
        backend.check_backend(config.model, config.trainer.precision)


@pytest.mark.parametrize(("allowed", "repeats"), [("0", True), ("1", False), (None, False)])
def test_attention_that_may_differ_is_known(monkeypatch, allowed, repeats):
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    if allowed is not None:
        monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", allowed)
    assert backend.attention_repeats("transformer_engine") is repeats
    assert backend.attention_repeats("flash_attn") and backend.attention_repeats("sdpa")
