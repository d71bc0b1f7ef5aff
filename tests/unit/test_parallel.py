"""A process that joins one job after another."""

from __future__ import annotations

import gc
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state
from tiny import make_config

from megatron_anymal.launcher.rejoining import gloo_threads
from megatron_anymal.parallel import initialize, next_number, shutdown


def test_numbers_begin_anew_in_each_job(tmp_path: Path) -> None:
    """Ranks of a job that have been in others before, and those that have not, count alike."""
    config = make_config("shards", "tokenizer", tmp_path)
    shutdown()
    for _ in range(2):
        initialize(config)
        first = [next_number() for _ in range(3)]
        # Already a part of the job.
        initialize(config)
        assert first == [0, 1, 2] and next_number() == 3
        shutdown()


def test_no_group_is_left_in_a_process_that_has_left_the_job(tmp_path: Path) -> None:
    initialize(make_config("shards", "tokenizer", tmp_path))
    before = gloo_threads()
    shutdown()
    gc.collect()
    assert not [name for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)]
    # Other tests may have left models behind, which refer to groups.
    assert gloo_threads() < before
