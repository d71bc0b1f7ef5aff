"""Replacement for the elastic agent on one node that does not import torch, which takes seconds.

It has the same functions and, if a rank fails, does what an agent does: it sends SIGTERM to the others, waits for them,
and raises an error with their exit codes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace


class ChildFailedError(Exception):
    def __init__(self, failures: dict[int, SimpleNamespace]) -> None:
        self.failures = failures


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("nnodes", "nproc-per-node", "max-restarts", "monitor-interval"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("rdzv-backend", "rdzv-id", "rdzv-endpoint", "local-addr", "ft-log-level"):
        parser.add_argument(f"--{name}")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def config_from_args(options: argparse.Namespace) -> tuple[SimpleNamespace, str, list[str]]:
    return SimpleNamespace(processes=int(options.nproc_per_node)), sys.executable, options.program


def run(options: argparse.Namespace) -> None:
    config, entrypoint, arguments = config_from_args(options)
    elastic_launch(config, entrypoint)(*arguments)


def elastic_launch(config: SimpleNamespace, entrypoint: str) -> Callable[..., None]:
    def launch(*arguments: str) -> None:
        processes = [start(rank, config, [entrypoint, *arguments]) for rank in range(config.processes)]
        while any(p.poll() is None for p in processes) and not any(p.returncode for p in processes):
            time.sleep(0.2)
        if any(p.returncode for p in processes):
            for process in processes:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGTERM)
            failed = [SimpleNamespace(pid=p.pid, exitcode=p.wait()) for p in processes]
            raise ChildFailedError({rank: one for rank, one in enumerate(failed) if one.exitcode})

    return launch


def start(rank: int, config: SimpleNamespace, words: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.processes)}
    logs = config.logs_specs
    with open(logs.file(str(rank), "out"), "wb") as out, open(logs.file(str(rank), "err"), "wb") as err:
        return subprocess.Popen(words, env=environment, stdout=out, stderr=err, start_new_session=True)
