"""A process that joins one job after another."""

from __future__ import annotations

import gc
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.launcher.rejoining import gloo_threads
from megatron_anymal.parallel import initialize, next_number, shutdown


def numbers(folder: Path) -> list[list[int]]:
    """In a rank: numbers of three jobs, of which it joins the last one twice."""
    config, job_numbers = make_config("shards", "tokenizer", folder), []
    for _ in range(3):
        shutdown()
        initialize(config)
        job_numbers.append([next_number() for _ in range(3)])
    initialize(config)
    return [*job_numbers, [next_number()]]


def test_numbers_begin_anew_in_each_job(tmp_path: Path) -> None:
    """Ranks of a job that have been in others before, and those that have not, count alike."""
    assert run_ranks(1, numbers, tmp_path) == [[[0, 1, 2], [0, 1, 2], [0, 1, 2], [3]]]


def left(folder: Path) -> tuple[int, int, list[str]]:
    """In a rank: gloo's threads in a job, and they and the groups after it."""
    initialize(make_config("shards", "tokenizer", folder))
    during = gloo_threads()
    shutdown()
    gc.collect()
    groups = [name for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)]
    return during, gloo_threads(), groups


def test_no_group_is_left_in_a_process_that_has_left_the_job(tmp_path: Path) -> None:
    [(during, after, groups)] = run_ranks(1, left, tmp_path)
    assert during > after == 0 and not groups
