"""Run a function on several processes that form a job over gloo, each test with a hard time limit.

Processes are forked, so that a test pays for the imports once; where there is a CUDA device they are started afresh,
because it cannot be used after a fork. The parent itself never joins a job.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` on `world` processes.

    Returns:
        What each rank returned, in their order. A rank that fails, or that is not done in time, fails the test.
    """
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    results: Any = context.Queue()
    port = _free_port()
    processes = [context.Process(target=_rank, args=(r, world, port, function, args, results)) for r in range(world)]
    for process in processes:
        process.start()
    outcome: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(outcome) < world and time.monotonic() < deadline:
            try:
                rank, error, value = results.get(timeout=0.2)
            except queue.Empty:
                continue
            if error:
                pytest.fail(f"rank {rank} of {world} failed:\n{error}")
            outcome[rank] = value
    finally:
        for process in processes:
            process.join(5 if len(outcome) == world else 0)
            if process.is_alive():
                process.kill()
                process.join()
    if len(outcome) < world:
        pytest.fail(f"ranks {sorted(set(range(world)) - set(outcome))} of {world} were not done in {timeout} s")
    return [outcome[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        torch.set_num_threads(1)
        results.put((rank, "", function(*args)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        results.close()
        results.join_thread()
        # Skip interpreter shutdown: gloo's threads may still wait for a peer that failed.
        os._exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
