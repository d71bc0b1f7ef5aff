"""Count the samples that readers of WebDataset shards lose silently, reading the same damaged shards with each.

    PYTHONPATH=.:tests python benchmarks/damaged_shards.py --energon-python /path/to/venv/bin/python

Each shard contains 20 samples of an image and its text, and one kind of damage: flipped or missing bytes, ranges of
zeros, changed header fields, members that are moved, duplicated, missing or links, two concatenated archives. A sample
is lost if it does not arrive with both members. It is lost silently if the reader did not report it: an exception, a
warning or a logged error counts for all samples of the shard; for this trainer's index, only a ledger entry that names
the sample or the position counts.

webdataset is the installed version. megatron-energon needs an environment of its own:

    python -m venv energon && energon/bin/pip install torch megatron-energon==7.4.1

Shards whose last members were replaced by zeros are excluded: no tar reader can distinguish them from shorter shards.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

SAMPLES = 20


def write_damaged(folder: Path, count: int, seed: int) -> list[str]:
    """Write `count` damaged shards, each in a folder of its own; return a description of each damage."""
    from fuzz.corpus import plain_members
    from fuzz.mutations import damage_shard

    rng, members = random.Random(seed), plain_members(SAMPLES)
    damages: list[str] = []
    while len(damages) < count:
        damaged = damage_shard(rng, members)
        if damaged.data and not damaged.zeroes_the_end(members):
            shard_folder = folder / f"{len(damages):05d}"
            shard_folder.mkdir()
            (shard_folder / "0.tar").write_bytes(damaged.data)
            damages.append(damaged.how)
    return damages


# Result of reading one shard: sample -> number of its members, and whether the reader reported a problem.
Answer = tuple[dict[str, int], bool]


def with_webdataset(folder: Path) -> Answer:
    """Iterate over a shard's samples."""
    import webdataset

    member_counts: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        try:
            for sample in webdataset.WebDataset([str(folder / "0.tar")], shardshuffle=False, empty_check=False):
                member_counts[sample["__key__"]] = sum(not name.startswith("__") for name in sample)
        except Exception:
            return member_counts, True
    # A warning about an unclosed file does not concern the content.
    return member_counts, any(warning.category is not ResourceWarning for warning in reported)


class _Heard(logging.Handler):
    """Counts warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count the record."""
        self.count += 1


def with_energon(folder: Path) -> Answer:
    """Prepare a shard as its own data set and iterate over it once."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_val_dataset,
        stateless,
    )
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    @edataclass
    class Members(Sample):
        count: int

    @stateless
    def cook(sample: Any) -> Any:
        return Members(**basic_sample_keys(sample), count=sum(not name.startswith("__") for name in sample))

    class ShardTask(DefaultTaskEncoder):
        cookers: ClassVar = [Cooker(cook)]

        def batch(self, samples: Any) -> Any:
            return samples

        def encode_batch(self, batch: Any) -> Any:
            return batch

    heard, member_counts = _Heard(), {}
    logging.getLogger().addHandler(heard)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            WebdatasetPreparator.prepare_dataset(
                folder, ["0.tar"], split_parts_ratio=[("train", 1.0)], workers=1, shuffle_seed=None
            )
            (folder / ".nv-meta" / "dataset.yaml").write_text(
                "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
            )
            configuration = WorkerConfig(rank=0, world_size=1, num_workers=0)
            data = get_val_dataset(
                folder, split_part="train", worker_config=configuration, batch_size=1, task_encoder=ShardTask()
            )
            for batch in get_loader(data):
                member_counts.update({sample.__key__: sample.count for sample in batch})
    # Its preparation exits the process for some shards.
    except (Exception, SystemExit):
        return member_counts, True
    finally:
        logging.getLogger().removeHandler(heard)
    return member_counts, heard.count > 0 or "rror" in errors.getvalue()


def with_anymal(folder: Path, tokenizer: str) -> tuple[dict[str, int], set[str] | None]:
    """Index a shard; return its samples, and those named by the ledger (None: all, the shard was refused)."""
    from megatron_anymal.data.index_builder import IndexOptions
    from megatron_anymal.data.index_folder import make_index
    from megatron_anymal.data.records import DataError
    from megatron_anymal.data.shard_index import ShardIndex

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_index(str(folder), IndexOptions(tokenizer), max_bad_share=1.0)
    except DataError:
        return {}, None
    index = ShardIndex(str(folder))
    member_counts = {index.key(n): int(index.samples["media_count"][n]) + 1 for n in range(len(index))}
    ledger = index.left_out()
    return member_counts, None if any(not entry.key for entry in ledger) else {entry.key for entry in ledger}


def summary(lost: list[set[str]], reported: list[Callable[[str], bool]]) -> dict[str, int]:
    """Count lost samples, and samples and shards with silent loss."""
    silent = [{key for key in keys if not is_reported(key)} for keys, is_reported in zip(lost, reported)]
    return {
        "samples_lost": sum(map(len, lost)),
        "shards_with_silent_loss": sum(map(bool, silent)),
        "samples_lost_in_silence": sum(map(len, silent)),
    }


def missing(counts: dict[str, int]) -> set[str]:
    """Keys of samples that did not arrive with both members."""
    return {key for key in (f"{n:04d}" for n in range(SAMPLES)) if counts.get(key) != 2}


def read_with_peer(python: str, peer: str, folder: Path, count: int) -> dict[str, Any]:
    """Run a peer in a separate process with its own Python environment."""
    command = [python, "-W", "ignore", __file__, "--read-with", peer, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    if done.returncode:
        sys.exit(f"{peer} did not run:\n{done.stderr[-2000:]}")
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers["shards"]) == count
    lost = [missing(counts) for counts, _ in answers["shards"]]
    reported: list[Callable[[str], bool]] = [lambda key, was=was: was for _, was in answers["shards"]]
    return {"version": answers["version"], "seconds": answers["seconds"], **summary(lost, reported)}


def serve_peer(peer: str, folder: Path) -> None:
    """Run in the peer's process: read every shard and print the results as JSON."""
    read = {"webdataset": with_webdataset, "energon": with_energon}[peer]
    begun = time.perf_counter()
    shards = [read(shard_folder) for shard_folder in sorted(folder.iterdir())]
    version = importlib.metadata.version({"energon": "megatron-energon"}.get(peer, peer))
    print(json.dumps({"version": version, "seconds": round(time.perf_counter() - begun, 1), "shards": shards}))


def main() -> None:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=500, help="damaged shards (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage (default: %(default)s)")
    parser.add_argument("--energon-python", help="Python executable with megatron-energon installed")
    parser.add_argument("--out", help="JSON file for the raw numbers")
    parser.add_argument("--read-with", nargs=2, metavar=("PEER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read_with:
        serve_peer(arguments.read_with[0], Path(arguments.read_with[1]))
        return
    from tiny import make_tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder, tokenizer = Path(temporary) / "shards", make_tokenizer(Path(temporary) / "tokenizer")
        folder.mkdir()
        write_damaged(folder, arguments.shards, arguments.seed)
        begun = time.perf_counter()
        answers = [with_anymal(shards, tokenizer) for shards in sorted(folder.iterdir())]
        named: list[Callable[[str], bool]] = [lambda key, keys=keys: keys is None or key in keys for _, keys in answers]
        ours = summary([missing(counts) for counts, _ in answers], named)
        seconds = round(time.perf_counter() - begun, 1)
        version = importlib.metadata.version("megatron-anymal")
        results = {"megatron_anymal": {"version": version, "seconds": seconds, **ours}}
        results["webdataset"] = read_with_peer(sys.executable, "webdataset", folder, arguments.shards)
        if arguments.energon_python:
            results["megatron-energon"] = read_with_peer(arguments.energon_python, "energon", folder, arguments.shards)
        else:
            print("megatron-energon was skipped: pass a Python that has it with --energon-python (see --help)")
    print(f"{arguments.shards} damaged shards of {SAMPLES} samples, seed {arguments.seed}\n")
    columns = ("version", "samples_lost", "shards_with_silent_loss", "samples_lost_in_silence", "seconds")
    print(f"| reader | {' | '.join(name.replace('_', ' ') for name in columns)} |\n{'|---' * (len(columns) + 1)}|")
    for name, counts in results.items():
        print(f"| {name} | {' | '.join(str(counts[column]) for column in columns)} |")
    if arguments.out:
        body = {"date": time.strftime("%Y-%m-%d"), "shards": arguments.shards, "seed": arguments.seed, **results}
        Path(arguments.out).write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
