"""Capabilities of this machine: devices, collectives, number formats and optional kernels."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_anymal.config import ConfigError, ModelConfig
from megatron_anymal.dependencies.installed import apex_kind, is_importable, version_of

# Lowest compute capability of GPUs with FP8 (Ada, Hopper) and bf16 (Ampere) matrix products.
_FP8_CAPABILITY = (8, 9)
# Of GPUs whose products take scales of blocks: MXFP8 and NVFP4 (Blackwell).
_BLOCK_SCALING_CAPABILITY = (10, 0)
_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Capabilities:
    """Devices and optional packages available to this process.

    Attributes:
        cuda_devices: names of the CUDA devices visible to this process.
        compute_capability: the lowest one among the devices; None without a device.
        transformer_engine: its version if it can be used, else "".
        transformer_engine_problem: why it cannot be used, else "".
        flash_attn: version of flash-attn, else "".
        nvidia_apex: NVIDIA's apex is installed with its CUDA kernels.
        foreign_apex: a package named apex is installed that is not NVIDIA's.
        nvidia_resiliency_ext: its version, else "".
        bf16: the devices compute in bf16 (CPUs do, slowly).
        fp8: the devices compute in FP8.
    """

    cuda_devices: tuple[str, ...]
    compute_capability: tuple[int, int] | None
    transformer_engine: str
    transformer_engine_problem: str
    flash_attn: str
    nvidia_apex: bool
    foreign_apex: bool
    nvidia_resiliency_ext: str
    bf16: bool
    fp8: bool


def capabilities() -> Capabilities:
    """Detect devices and optional packages, without creating a CUDA context."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lowest = min((torch.cuda.get_device_capability(i) for i in range(count)), default=None)
    engine, problem = _transformer_engine(count > 0)
    apex = apex_kind()
    return Capabilities(
        cuda_devices=tuple(torch.cuda.get_device_name(i) for i in range(count)),
        compute_capability=lowest,
        transformer_engine=engine,
        transformer_engine_problem=problem,
        flash_attn=version_of("flash-attn"),
        nvidia_apex=apex == "nvidia" and is_importable("amp_C"),
        foreign_apex=apex == "foreign",
        nvidia_resiliency_ext=version_of("nvidia-resiliency-ext"),
        bf16=lowest is None or lowest >= _BF16_CAPABILITY,
        fp8=lowest is not None and lowest >= _FP8_CAPABILITY,
    )


def collectives_backend() -> str:
    """Backend of torch.distributed on this machine."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def device() -> torch.device:
    """This process's device: the CUDA device of its local rank, or the CPU.

    Raises:
        ConfigError: this node has more processes than CUDA devices.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1 and os.environ.get("SLURM_GPUS_PER_TASK") == "1":
        # Slurm exposes only its own GPU to each task.
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ConfigError(
            f"local process {local_rank} has no CUDA device: this node has {count} visible. Set trainer.devices (and "
            f"torchrun's --nproc-per-node) to {count} at most, or check CUDA_VISIBLE_DEVICES."
        )
    return torch.device("cuda", local_rank)


def compute_dtype(precision: str) -> torch.dtype:
    """Number format of the forward and backward pass, for a value of `trainer.precision`."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def transformer_impl(model: ModelConfig) -> Literal["local", "transformer_engine"]:
    """Implementation of the Llama's layers; "auto" selects Transformer Engine if it can run."""
    wanted = model.transformer_impl
    if wanted == "auto" and model.base_quantization:
        # Transformer Engine's layers do not compute with NF4 weights.
        return "local"
    if wanted == "auto":
        engine, _ = _transformer_engine(torch.cuda.is_available())
        return "transformer_engine" if engine else "local"
    return "transformer_engine" if wanted == "transformer_engine" else "local"


def attention_kernel(model: ModelConfig, precision: str) -> str:
    """Attention kernel for the documents of a pack: transformer_engine, flash_attn, flex or sdpa.

    "auto" selects scaled dot-product attention on CPUs, and on GPUs a kernel that needs neither a mask nor padding:
    Transformer Engine's, flash-attn's for packed documents (16-bit only), or torch's flex attention.

    Args:
        precision: `trainer.precision`.
    """
    if transformer_impl(model) == "transformer_engine":
        return "transformer_engine"
    if model.attention != "auto":
        return model.attention
    if not torch.cuda.is_available():
        return "sdpa"
    return "flash_attn" if version_of("flash-attn") and precision == "bf16" else "flex"


def attention_repeats(kernel: str) -> bool:
    """Whether the backward pass of an attention kernel repeats bit for bit; see `attention_kernel`."""
    return kernel != "transformer_engine" or os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0"


def check_backend(model: ModelConfig, precision: str) -> None:
    """Reject settings that this machine cannot run.

    Args:
        precision: `trainer.precision`.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    machine = capabilities()
    if model.transformer_impl == "transformer_engine" and not machine.transformer_engine:
        raise ConfigError(
            "model.transformer_impl=transformer_engine cannot run here: "
            f"{machine.transformer_engine_problem}. Install it with `pip install -e '.[te]' "
            "--no-build-isolation` on a CUDA machine, or set model.transformer_impl=auto."
        )
    if precision == "bf16" and not machine.bf16:
        raise ConfigError(
            f"trainer.precision=bf16 needs compute capability 8.0 or later; the GPUs here have "
            f"{_shown(machine.compute_capability)}. Set trainer.precision=32."
        )
    if model.fp8 or model.fp4:
        _check_narrow_products(model, precision, machine)
    if model.base_quantization:
        _check_bitsandbytes()
    if model.dpo.share_prompt == "always" and transformer_impl(model) == "transformer_engine":
        raise ConfigError(
            "model.dpo.share_prompt=always: Transformer Engine's attention cannot share a prompt between two answers. "
            "Set model.transformer_impl=local, or model.dpo.share_prompt=auto."
        )
    _check_attention(model, precision, machine)
    if (
        model.recompute_granularity == "selective"
        and "layernorm" in model.recompute_modules
        and transformer_impl(model) == "local"
    ):
        raise ConfigError(
            "model.recompute_modules=[layernorm] needs Transformer Engine layers, which do not run here "
            f"({machine.transformer_engine_problem or 'model.transformer_impl=local'}). Remove layernorm from the list."
        )


def _check_attention(model: ModelConfig, precision: str, machine: Capabilities) -> None:
    wanted = model.attention
    if wanted == "auto":
        return
    key = f"model.attention={wanted}"
    if transformer_impl(model) == "transformer_engine":
        raise ConfigError(
            f"{key} has no effect on Transformer Engine layers, which bring their own attention. Set it to auto, or "
            "model.transformer_impl=local."
        )
    if wanted in ("flash_attn", "flex") and not machine.cuda_devices:
        raise ConfigError(f"{key} needs a CUDA device. Set it to auto.")
    if wanted == "flash_attn" and not machine.flash_attn:
        raise ConfigError(f"{key}: flash-attn is not installed. `pip install -e '.[flash]'`, or set it to auto.")
    if wanted == "flash_attn" and precision != "bf16":
        raise ConfigError(f"{key} needs trainer.precision=bf16. Set that, or model.attention=auto.")


def _check_narrow_products(model: ModelConfig, precision: str, machine: Capabilities) -> None:
    """Check what products in FP8 or NVFP4 need."""
    key = f"model.fp8={model.fp8}" if model.fp8 else f"model.fp4={model.fp4}"
    alternative = f"or set {key.partition('=')[0]}=''"
    # Without Transformer Engine megatron-core silently ignores fp8 and fp4.
    if not machine.transformer_engine:
        raise ConfigError(
            f"{key} needs Transformer Engine, which cannot run here: {machine.transformer_engine_problem}. "
            f"Install it with `pip install -e '.[te]' --no-build-isolation`, {alternative}."
        )
    if model.transformer_impl == "local":
        raise ConfigError(f"{key} has no effect with model.transformer_impl=local. Set that to auto, {alternative}.")
    if model.fp4:
        _check_block_scaling(key, "NVFP4", f"Use such a GPU, {alternative}.", machine)
    elif model.fp8_recipe == "mxfp8":
        fix = "Use such a GPU, or set model.fp8_recipe=tensorwise."
        _check_block_scaling("model.fp8_recipe=mxfp8", "MXFP8", fix, machine)
    elif not machine.fp8:
        raise ConfigError(
            f"{key} needs a GPU with FP8 (compute capability 8.9: Ada, Hopper or later); here it is "
            f"{_shown(machine.compute_capability)}. Use such a GPU, {alternative}."
        )
    if precision != "bf16":
        raise ConfigError(f"{key} needs trainer.precision=bf16. Set that, {alternative}.")


def _check_block_scaling(key: str, name: str, fix: str, machine: Capabilities) -> None:
    """Check that all GPUs and Transformer Engine compute in MXFP8 or NVFP4."""
    capability = machine.compute_capability
    if capability is None or capability < _BLOCK_SCALING_CAPABILITY:
        raise ConfigError(
            f"{key} needs a GPU with {name} (compute capability 10.0: Blackwell); here it is {_shown(capability)}. "
            f"{fix}"
        )
    engine = importlib.import_module("transformer_engine.pytorch")
    available, reason = getattr(engine, f"is_{name.lower()}_available")(return_reason=True)
    if not available:
        raise ConfigError(f"{key} is refused by Transformer Engine {machine.transformer_engine}: {reason} {fix}")


def _check_bitsandbytes() -> None:
    install = "Install it with `pip install -e '.[nf4]'`, or set model.base_quantization=''."
    if not is_importable("bitsandbytes"):
        raise ConfigError(f"model.base_quantization=nf4 needs bitsandbytes, which is not installed. {install}")
    try:
        importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # A build for another torch or CUDA fails in many ways.
        raise ConfigError(
            f"model.base_quantization=nf4 needs bitsandbytes, which does not import here ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). {install}"
        ) from error


def _transformer_engine(has_cuda: bool) -> tuple[str, str]:
    """Return (version, "") if it can be used, else ("", reason)."""
    if not has_cuda:
        return "", "there is no CUDA device"
    if not is_importable("transformer_engine"):
        return "", "it is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # A wheel built for another torch or CUDA fails in many ways.
        return "", f"it does not import ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    module = importlib.import_module("transformer_engine")
    return str(getattr(module, "__version__", "")) or version_of("transformer-engine"), ""


def _shown(capability: tuple[int, int] | None) -> str:
    return "none (no CUDA device)" if capability is None else f"{capability[0]}.{capability[1]}"
