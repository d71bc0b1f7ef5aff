"""Host memory of all ranks and their loader processes, for the log."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_anymal.data.loader_workers import LoaderMemory
from megatron_anymal.process_memory import GIB, resident_bytes

# Names of these metrics.
MEMORY_METRICS = ("host_memory_gib", "loader_memory_gib", "loader_growth_gib")


def memory_metrics(loader: LoaderMemory, device: torch.device) -> dict[str, float]:
    """Return the largest values over all ranks, in GiB. Collective.

    `host_memory_gib` is that of a rank, `loader_memory_gib` that of a loader process and `loader_growth_gib` its growth
    since it started, each of the process with the most; the last two are 0 if the ranks read their data themselves.

    Args:
        loader: the memory of this rank's loader processes.
        device: of the ranks' collectives.
    """
    worst = torch.tensor([resident_bytes(), *loader.largest()], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {name: count / GIB for name, count in zip(MEMORY_METRICS, worst.tolist())}
