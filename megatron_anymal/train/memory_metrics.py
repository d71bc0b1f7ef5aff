"""Memory of all ranks, of their loader processes and of their GPUs, for the log."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_anymal.data.loader_workers import LoaderMemory
from megatron_anymal.process_memory import GIB, resident_bytes

# Names of these metrics.
MEMORY_METRICS = ("host_memory_gib", "loader_memory_gib", "loader_growth_gib", "device_memory_gib")


def memory_metrics(loader: LoaderMemory, device: torch.device) -> dict[str, float]:
    """Return the largest values over all ranks, in GiB. Collective.

    `host_memory_gib` is that of a rank, `loader_memory_gib` that of a loader process and `loader_growth_gib` its growth
    since it started, each of the process with the most; these two are 0 if the ranks read their data themselves.
    `device_memory_gib` is the most that tensors have taken on a rank's GPU since its start; 0 on a CPU.

    Args:
        loader: the memory of this rank's loader processes.
        device: of the ranks' collectives.
    """
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    worst = torch.tensor([resident_bytes(), *loader.largest(), peak], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {name: count / GIB for name, count in zip(MEMORY_METRICS, worst.tolist())}
