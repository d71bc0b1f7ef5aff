"""Run a function on several processes that form a gloo job, with a hard time limit.

Processes are forked from the fork server, so that tests pay for the imports once. The process that runs the tests never
joins a job.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle
import fork_server
import forks
import pytest
import torch
from ports import free_port


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*args)` on `world` processes, which do not see changes that this one made to modules.

    Returns:
        The return values in rank order. A rank that fails or exceeds the time limit fails the test.
    """
    processes, results = start_ranks(world, function, args)
    outcome: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(outcome) < world and time.monotonic() < deadline:
            # Checked before the queue: a rank that has exited has already put its result there.
            lost = [rank for rank, process in enumerate(processes) if process.exitcode]
            try:
                rank, error, value = results.get(timeout=0.2)
            except queue.Empty:
                if lost:
                    pytest.fail(
                        f"of {world} ranks, some ended without an answer, see their output: {_ended(processes)}"
                    )
                continue
            if error:
                # A rank fails, too, if another one has crashed.
                time.sleep(0.2)
                pytest.fail(f"rank {rank} of {world} failed ({_ended(processes) or 'none has crashed'}):\n{error}")
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


def _ended(processes: list[Any]) -> str:
    """The ranks that ended with an exit code other than 0."""
    codes = [(rank, process.exitcode) for rank, process in enumerate(processes)]
    return ", ".join(f"rank {rank} ended with exit code {code}" for rank, code in codes if code)


def start_ranks(world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """Start the processes; return them and the queue of (rank, error, return value)."""
    results: Any = fork_server.CONTEXT.Queue()
    port = free_port()
    # cloudpickle, because pickle rejects functions defined inside tests.
    call = cloudpickle.dumps((function, args))
    return [fork_server.start(_rank, rank, world, port, call, results) for rank in range(world)], results


def _rank(rank: int, world: int, port: int, call: bytes, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    # A crash in native code leaves its stack.
    faulthandler.enable(2)
    try:
        torch.set_num_threads(1)
        function, args = cloudpickle.loads(call)
        value = function(*args)
        results.put((rank, "\n".join(forks.unsafe()), value))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        results.close()
        results.join_thread()
        # megatron-core's writer leaves a manager process behind, which only interpreter shutdown would end.
        for child in multiprocessing.active_children():
            child.kill()
        # Skip interpreter shutdown: gloo's threads may still wait for a peer that failed.
        os._exit(0)
