"""Threads of requests: results and errors arrive, and the threads end with their pool."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from megatron_anymal.object_storage.daemon_pool import DaemonPool


def threads() -> int:
    return sum(thread.name == "object-storage" for thread in threading.enumerate())


def test_results_errors_and_end() -> None:
    gc.collect()
    before = threads()
    pool = DaemonPool(3)
    barrier = threading.Barrier(3)
    assert sorted(future.result(240) for future in [pool.submit(barrier.wait, 240) for _ in range(3)]) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 1, 0).result(240)
    assert pool.submit(divmod, 7, 2).result(240) == (3, 1)
    assert threads() == before + 3
    del pool
    gc.collect()
    deadline = time.monotonic() + 5
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= before
