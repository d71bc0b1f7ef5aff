"""Process groups, and each rank's position in the parallel layout."""

from __future__ import annotations

import atexit
import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_anymal import backend
from megatron_anymal.config import ConfigError, ModelConfig, RunConfig
from megatron_anymal.config.validation import check

# Counts what all processes of a job do equally often, from the moment they have joined it.
_numbers = itertools.count()
# Long enough for a first read of 70B weights, short enough to notice a dead rank.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class ParallelLayout:
    """This process's ranks, and the parallel sizes of the job."""

    # Device of this process.
    device: torch.device
    # Rank in the job.
    rank: int
    # Number of processes in the job.
    world_size: int
    # Rank in the tensor-parallel group.
    tensor_rank: int
    # Tensor-parallel size.
    tensor_size: int
    # Pipeline stage.
    pipeline_rank: int
    # Number of pipeline stages.
    pipeline_size: int
    # Number of this process's replica.
    data_rank: int
    # Number of replicas.
    data_size: int
    # Rank in the context-parallel group.
    context_rank: int = 0
    # Context-parallel size.
    context_size: int = 1

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the encoders, the projectors and the text embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the LM head and computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank writes the log and the run's files."""
        return self.rank == 0

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's losses enter sums over all ranks, so that each token counts once."""
        return self.is_last_stage and self.tensor_rank == 0


def initialize(config: RunConfig) -> ParallelLayout:
    """Check the configuration, join the job and create its process groups.

    Under torchrun (or Slurm with the same environment variables) the process joins that job; otherwise it is a job of
    one process.

    Raises:
        ConfigError: a setting cannot work on this machine, or the number of launched processes is not the configured
            one.
    """
    check(config)
    backend.check_backend(config.model, config.trainer.precision)
    if not torch.cuda.is_available():
        from megatron_anymal import cpu_shim

        cpu_shim.install()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != config.world_size:
        raise ConfigError(
            f"trainer.num_nodes x trainer.devices = {config.world_size}, but the launcher started {world_size} "
            f"process(es). Start with `torchrun --nproc-per-node={config.trainer.devices} -m megatron_anymal ...` "
            "or change trainer.devices."
        )
    # fp32 means fp32: cuDNN would round the inputs of convolutions to TF32.
    torch.backends.cudnn.allow_tf32 = False
    device = backend.device()
    _join(world_size, device)
    make_groups(config.model)
    _seed(config.model.seed)
    return ParallelLayout(
        device=device,
        rank=dist.get_rank(),
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
    )


def make_groups(model: ModelConfig, *, cpu_groups: bool = True) -> None:
    """Create megatron-core's process groups over the processes that have joined, replacing existing groups.

    Args:
        cpu_groups: also create gloo groups, which megatron-core's checkpoints use.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    virtual = model.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=model.context_parallel_size,
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
        create_gloo_process_groups=cpu_groups,
    )


def next_number() -> int:
    """A number that no earlier call in this job returned, for keys in the job's store: the same on all ranks that
    call this equally often."""
    return next(_numbers)


def sum_over_ranks(values: torch.Tensor) -> None:
    """Sum a tensor over all processes of the job, in place; a job of one process has nothing to add. Collective.

    Args:
        values: of any shape, the same on all ranks.
    """
    if dist.get_world_size() > 1:
        dist.all_reduce(values)


def gather_numbers(own: Sequence[float], device: torch.device) -> torch.Tensor:
    """The numbers of all processes of the job, in one exchange; a job of one process has only its own. Collective.

    Args:
        own: this rank's numbers, as many as on every other rank.
        device: of the ranks' collectives.

    Returns:
        [ranks, numbers], float64, on the CPU.
    """
    mine = torch.tensor(own, dtype=torch.float64, device=device)
    ranks = dist.get_world_size()
    if ranks == 1:
        return mine[None].cpu()
    gathered = mine.new_empty(ranks * len(own))
    dist.all_gather_into_tensor(gathered, mine)
    return gathered.view(ranks, len(own)).cpu()


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes of the job, in rank order; without a job, only this one. Collective.

    Args:
        value: anything that can be pickled.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _join(world_size: int, device: torch.device) -> None:
    global _numbers
    if dist.is_initialized():
        return
    _numbers = itertools.count()
    kind = backend.collectives_backend()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(kind, timeout=COLLECTIVE_TIMEOUT)
    # A process that exits normally leaves the job before the interpreter shuts down: gloo threads that still run then
    # would abort it ("terminate called without an active exception"), and torchrun would kill the other ranks. Once,
    # even if the process joins several jobs.
    atexit.unregister(shutdown)
    atexit.register(shutdown)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the job: no thread and no connection of its groups is left, once no model refers to them any more."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        # megatron-core 0.16.1 forgets two of its groups, whose connections would keep peers waiting
        # (findings/destroyed_layout_keeps_two_groups.sh).
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, dist.ProcessGroup):
                setattr(parallel_state, name, None)
        dist.destroy_process_group()
