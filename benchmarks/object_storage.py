"""Measure reading micro-batches from an S3 server with artificial latency.

    PYTHONPATH=.:tests python benchmarks/object_storage.py --out results.json

An S3 server (moto) on loopback answers every request for a shard after `--latency` seconds, as object stores do, so
that most of the time is spent waiting and hardly any in computing. One loader process reads the same micro-batches in
turns:

- member by member: one request per text and media item, one after the other;
- coalesced: all requests of a micro-batch at once, with neighbouring ranges merged;
- read ahead: the same, together with the requests of the next two micro-batches;
- cached: from blocks that an earlier pass has stored on the local disk.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from measuring import surroundings
from object_store import ENVIRONMENT, ObjectStore, object_store
from replicas import replica_data
from tiny import make_config, make_shards, make_tokenizer

from megatron_anymal.config import RunConfig, StorageConfig
from megatron_anymal.data.loader import MicroBatchReader, steps

KINDS = ("image", "audio", "imu", "mixed")


def measure(config: RunConfig, store: ObjectStore, count: int, latency: float) -> dict[str, float]:
    """Read the micro-batches of `count` steps: seconds, micro-batches, and requests for shards."""
    data = replica_data(config)
    store.fail(".tar", "slow", times=10**9, seconds=latency)
    begun = time.perf_counter()
    run = steps(data.planner, data.reader, replica=0, start=0, stop=count, num_workers=1, prefetch_steps=2)
    read = sum(len(batches) for _, batches in run)
    return {"seconds": time.perf_counter() - begun, "micro_batches": read, "requests": len(store.log(".tar"))}


def sides(cache: Path) -> dict[str, StorageConfig]:
    """Settings of each way to read."""
    return {
        "member by member": StorageConfig(cache_folder=str(cache), read_ahead=0),
        "coalesced": StorageConfig(cache_folder=str(cache), read_ahead=0),
        "read ahead": StorageConfig(cache_folder=str(cache)),
        "cached": StorageConfig(cache_folder=str(cache), cache_gib=1.0),
    }


def main() -> None:
    """Measure all ways in turns, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400, help="samples in the shards (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=20, help="steps whose micro-batches are read (default: %(default)s)"
    )
    parser.add_argument(
        "--latency", type=float, default=0.03, help="latency of each request, in seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="measured rounds, after one that fills the cache (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    rounds_of: dict[str, list[dict[str, float]]] = {}
    request = MicroBatchReader.request
    with tempfile.TemporaryDirectory() as name, object_store(Path(name)) as store:
        folder = Path(name)
        os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=store.url)
        tokenizer = make_tokenizer(folder / "tokenizer")
        shards = make_shards(folder / "shards", tokenizer, arguments.samples, KINDS)
        config = make_config(store.upload(shards, "shards"), tokenizer, folder / "run")
        config.model.global_batch_size = 32
        for number in range(arguments.rounds + 1):
            for side, settings in sides(folder / "cache").items():
                config.data.storage = settings
                MicroBatchReader.request = (lambda self, plan: None) if side == "member by member" else request
                result = measure(config, store, arguments.steps, arguments.latency)
                # The first round fills the cache.
                if number:
                    rounds_of.setdefault(side, []).append(result)
    for side, rounds in rounds_of.items():
        best = min(rounds, key=lambda one: one["seconds"])
        each, requests = (best[name] / best["micro_batches"] for name in ("seconds", "requests"))
        print(f"{side:18} {1000 * each:7.1f} ms and {requests:5.1f} requests per micro-batch")
    if arguments.out:
        sizes = {key: value for key, value in vars(arguments).items() if key != "out"}
        arguments.out.write_text(json.dumps({**surroundings(), **sizes, "rounds_of": rounds_of}, indent=1))


if __name__ == "__main__":
    main()
