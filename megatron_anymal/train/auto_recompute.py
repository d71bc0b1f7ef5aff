"""Apply model.recompute_granularity=auto: choose the recomputation that fits the job's GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping

import psutil
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from megatron_anymal import backend
from megatron_anymal.config import ModelConfig
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.modalities import Modality
from megatron_anymal.model.memory.encoder_sizes import measured_encoders
from megatron_anymal.model.memory.recompute import MARGIN, choose, planned_attention
from megatron_anymal.model.memory.run_sizes import llama_sizes, run_sizes
from megatron_anymal.model.memory.sizes import RunSizes

_GB = 1e9


def fit_recompute(model: ModelConfig, devices: int, run: RunSizes, device: torch.device) -> tuple[ModelConfig, str]:
    """Replace `auto` by a choice that fits the job's smallest GPU. Collective.

    Args:
        devices: `trainer.devices`, the processes of a node.
        run: see `sizes_of_run`.
        device: this process's device.

    Returns:
        The section to build the model from, and a log line.

    Raises:
        ConfigError: nothing fits.
    """
    memory = torch.tensor(memory_to_fit(model.memory_gb, devices), dtype=torch.int64, device=device)
    dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    choice = choose(run, int(memory))
    return choice.applied(model), f"recompute {choice}"


def memory_to_fit(memory_gb: float, devices: int) -> int:
    """Bytes available to one process: `memory_gb`, or if that is 0 its GPU's memory less MARGIN, or without a GPU its
    share of the machine's free memory.

    Args:
        memory_gb: `model.memory_gb`, in units of 1e9 bytes.
        devices: `trainer.devices`, the processes of a node if the launcher does not tell.

    Raises:
        ConfigError: this node has more processes than CUDA devices.
    """
    if memory_gb:
        return int(memory_gb * _GB)
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(backend.device()).total_memory * (1 - MARGIN))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", str(devices)))
    return psutil.virtual_memory().available // processes


def sizes_of_run(
    model: ModelConfig,
    precision: str,
    layout: BatchLayout,
    hf: LlamaConfig,
    modalities: Mapping[str, Modality],
    *,
    reference: bool = False,
    planned: bool = False,
) -> RunSizes:
    """Return the sizes from which model/memory computes a run's memory use.

    Args:
        precision: `trainer.precision`.
        layout: of the run's batches.
        hf: the Llama's HuggingFace configuration.
        modalities: by their name in the configuration.
        reference: whether a frozen copy of the adapters is held (DPO).
        planned: assume a GPU even if this machine has none.

    Raises:
        ConfigError: sizes do not divide, or an encoder cannot be built.
    """
    attention = backend.attention_kernel(model, precision)
    if planned and not torch.cuda.is_available():
        attention = planned_attention(model)
    on_cpu = not (planned or torch.cuda.is_available())
    llama = llama_sizes(model, precision, hf, attention=attention, on_cpu=on_cpu)
    return run_sizes(model, layout, hf, llama, measured_encoders(model, precision, modalities), reference=reference)
