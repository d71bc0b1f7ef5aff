"""Memory of all ranks, of their loader processes and of their GPUs, for the log."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_anymal.data.loader_workers import LoaderMemory
from megatron_anymal.processes.process_memory import GIB, resident_bytes

# Names of these metrics.
MEMORY_METRICS = ("host_memory_gib", "loader_memory_gib", "loader_growth_gib", "device_memory_gib")


def own_memory(loader: LoaderMemory, device: torch.device) -> list[float]:
    """This rank's bytes, one number for each of MEMORY_METRICS.

    Args:
        loader: the memory of this rank's loader processes.
        device: of this rank.
    """
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return [resident_bytes(), *loader.largest(), peak]


def memory_metrics(every: Tensor) -> dict[str, float]:
    """Return the largest values over all ranks, in GiB.

    `host_memory_gib` is that of a rank, `loader_memory_gib` that of a loader process and `loader_growth_gib` its growth
    since it started, each of the process with the most; these two are 0 if the ranks read their data themselves.
    `device_memory_gib` is the most that tensors have taken on a rank's GPU since its start; 0 on a CPU.

    Args:
        every: `own_memory` of all ranks, [ranks, numbers].
    """
    return {name: count / GIB for name, count in zip(MEMORY_METRICS, every.amax(0).tolist())}
