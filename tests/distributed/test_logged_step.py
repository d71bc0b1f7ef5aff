"""What a logged step exchanges between ranks: one collective, from which each metric takes its maximum or mean."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from benchmarks.measuring import Dispatched
from megatron_anymal.parallel import gather_numbers
from megatron_anymal.processes.process_memory import GIB
from megatron_anymal.train.memory_metrics import memory_metrics
from megatron_anymal.train.pass_times import PASS_METRICS, pass_metrics


def gathered(rank_numbers: list[list[float]]) -> tuple[list[list[float]], dict[str, int]]:
    torch.distributed.init_process_group("gloo")
    mine = rank_numbers[torch.distributed.get_rank()]
    with Dispatched() as seen:
        every = gather_numbers(mine, torch.device("cpu"))
    return every.tolist(), dict(seen.collectives)


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_gets_the_numbers_of_all_in_one_exchange(ranks: int) -> None:
    # Bytes of a large host do not fit into 32 bits.
    numbers = [[1.0, 2.0**43 + 1, 0.1], [4.0, 5.0, 0.2]][:ranks]
    rank_results = run_ranks(ranks, gathered, numbers)
    assert [every for every, _ in rank_results] == [numbers] * ranks
    assert [sum(collectives.values()) for _, collectives in rank_results] == [ranks - 1] * ranks


def test_memory_is_that_of_the_rank_with_the_most() -> None:
    every = torch.tensor([[3.0, 1.0, 0.0, 7.0], [2.0, 4.0, 0.5, 0.0]], dtype=torch.float64) * GIB
    assert list(memory_metrics(every).values()) == [3.0, 4.0, 0.5, 7.0]


def test_pass_times_are_means_over_the_ranks() -> None:
    every = torch.arange(10, dtype=torch.float64).view(2, 5)
    assert pass_metrics(every) == dict(zip(PASS_METRICS, [2.5, 3.5, 4.5, 5.5, 6.5]))
