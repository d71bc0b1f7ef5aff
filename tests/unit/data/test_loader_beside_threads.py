"""Loader workers are forked from a rank with busy threads: OpenMP's, the lock's, a checkpoint writer's."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from pathlib import Path

import torch
from ranks import run_ranks
from replicas import replica_data
from tiny import make_config

from megatron_anymal.checkpoint.run_lock import RunLock
from megatron_anymal.config import RunConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.safetensors_io import HashedFile


def read(config: RunConfig, workers: int) -> list[torch.Tensor]:
    """All tokens and media of four steps."""
    data = replica_data(config)
    tensors = []
    for _, batches in steps(
        data.planner, data.reader, replica=0, start=0, stop=4, num_workers=workers, prefetch_steps=2
    ):
        for batch in batches:
            tensors += [batch.tokens, *(media.pieces for media in batch.media.values())]
    return tensors


def read_beside_threads(config: RunConfig, folder: Path) -> bool:
    """In a rank: whether workers that are started repeatedly read the same data as this process."""
    torch.set_num_threads(4)
    large = torch.ones(512, 512)
    assert float((large @ large).sum()) == 512.0**3
    stop = threading.Event()

    def write() -> None:
        """Hash, write, sync and log, as the checkpoint writer, heartbeat and lock threads do."""
        number = 0
        while not stop.is_set():
            number += 1
            file = HashedFile(folder / f"{threading.get_ident()}")
            file.write(json.dumps({"number": number}).encode() * 1000)
            file.close()
            hashlib.new("sha256", b"x" * 100_000).hexdigest()
            logging.getLogger("busy").warning("%d", number)

    logging.getLogger("busy").addHandler(logging.StreamHandler(open(folder / "log", "w")))  # noqa: SIM115
    logging.getLogger("busy").propagate = False
    lock = RunLock(folder, 0.4)
    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    try:
        expected = read(config, 0)
        worker_reads = [read(config, 2) for _ in range(8)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
        lock.release()
    return all(len(one) == len(expected) and all(map(torch.equal, one, expected)) for one in worker_reads)


def test_workers_start_beside_threads(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    assert run_ranks(1, read_beside_threads, config, tmp_path) == [True]
