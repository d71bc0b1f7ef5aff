"""Processes with threads are never forked: neither the test process nor the server that ranks are forked from."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import fork_server
import forks
import torch
from ranks import run_ranks

from megatron_anymal import lean_imports


def fork() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


def fork_beside_a_thread() -> list[str]:
    """Fork while another thread waits; return the forks recorded."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    fork()
    done.set()
    thread.join()
    return forks.unsafe()


def test_it_is_noted_here() -> None:
    [noted] = fork_beside_a_thread()
    assert "threads was forked" in noted and Path(__file__).name in noted


def alone() -> tuple[list[str], list[str]]:
    fork()
    return forks.unsafe(), fork_beside_a_thread()


def test_it_is_noted_in_a_rank() -> None:
    nothing, [noted] = run_ranks(1, alone)[0]
    assert not nothing and "a process with 2 threads was forked" in noted


def multiply(size: int) -> float:
    """Multiply matrices large enough for several threads, with four threads enabled."""
    torch.set_num_threads(4)
    return float((torch.ones(size, size) @ torch.ones(size, size)).sum())


def test_threads_here_do_not_stop_a_rank() -> None:
    """OpenMP's thread pool is running in this process: a fork of it would hang in its first matrix product."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert multiply(512) == 512.0**3
        assert run_ranks(1, multiply, 512) == [512.0**3]
    finally:
        torch.set_num_threads(before)


def collects() -> tuple[bool, bool, bool]:
    return gc.isenabled(), gc.get_freeze_count() > 100_000, lean_imports.are_frozen()


def test_a_rank_collects_its_own_garbage_only() -> None:
    assert run_ranks(1, collects) == [(True, True, True)]
    assert gc.isenabled()


def write_place(path: Path) -> None:
    path.write_text(f"{os.getcwd()} {os.environ['SET_IN_A_TEST']}")
    os.write(1, b"to the caller's output\n")


def test_environment_folder_and_output_are_the_callers(tmp_path: Path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    run_ranks(1, fork)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SET_IN_A_TEST", "value")
    process = fork_server.start(write_place, tmp_path / "place")
    process.join(240)
    assert process.exitcode == 0
    assert (tmp_path / "place").read_text() == f"{tmp_path / 'here'} value"
    assert capfd.readouterr().out == "to the caller's output\n"
