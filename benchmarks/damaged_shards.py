"""What readers of WebDataset shards lose without a word: the same damaged shards through each of them.

    PYTHONPATH=.:tests python benchmarks/damaged_shards.py --energon-python /path/to/venv/bin/python

Each shard holds 20 samples, a picture and its text, and one damage: flipped or missing bytes, holes of zeros, changed
header fields, members that are moved, doubled, missing or links, two archives joined. A sample is lost if it does not
arrive with both members. It is lost in silence if the reader did not tell: an exception, a warning or an error in its
log counts for all samples of the shard; of this trainer's index, only a line of its ledger that names the sample or the
place.

webdataset is the installed one. megatron-energon wants an environment of its own:

    python -m venv energon && energon/bin/pip install torch megatron-energon==7.4.1

Shards whose last members were replaced by zeros are left out: no reader of tar can tell them from shorter ones.
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
    """Write `count` damaged shards, each in a folder of its own; returns what is wrong with each."""
    from fuzz.corpus import plain_members
    from fuzz.mutations import damage_shard

    rng, members = random.Random(seed), plain_members(SAMPLES)
    how: list[str] = []
    while len(how) < count:
        damaged = damage_shard(rng, members)
        if damaged.data and not damaged.zeroes_the_end(members):
            place = folder / f"{len(how):05d}"
            place.mkdir()
            (place / "0.tar").write_bytes(damaged.data)
            how.append(damaged.how)
    return how


# What a reader answers of one shard: sample -> number of its members, and whether it told of a problem.
Answer = tuple[dict[str, int], bool]


def with_webdataset(folder: Path) -> Answer:
    """Iterate over a shard's samples."""
    import webdataset

    found: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            for sample in webdataset.WebDataset([str(folder / "0.tar")], shardshuffle=False, empty_check=False):
                found[sample["__key__"]] = sum(not name.startswith("__") for name in sample)
        except Exception:
            return found, True
    # That a file was not closed says nothing of its content.
    return found, any(warning.category is not ResourceWarning for warning in told)


class _Heard(logging.Handler):
    """Counts warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count one."""
        self.count += 1


def with_energon(folder: Path) -> Answer:
    """Prepare a shard as a data set of its own and iterate over it once."""
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

    class Encoder(DefaultTaskEncoder):
        cookers: ClassVar = [Cooker(cook)]

        def batch(self, samples: Any) -> Any:
            return samples

        def encode_batch(self, batch: Any) -> Any:
            return batch

    heard, found = _Heard(), {}
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
                folder, split_part="train", worker_config=configuration, batch_size=1, task_encoder=Encoder()
            )
            for batch in get_loader(data):
                found.update({sample.__key__: sample.count for sample in batch})
    # Its preparation ends the process over some shards.
    except (Exception, SystemExit):
        return found, True
    finally:
        logging.getLogger().removeHandler(heard)
    return found, heard.count > 0 or "rror" in errors.getvalue()


def with_anymal(folder: Path, tokenizer: str) -> tuple[dict[str, int], set[str] | None]:
    """Index a shard; returns its samples, and those that the ledger names (None: all, the shard was refused)."""
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
    found = {index.key(n): int(index.samples["media_count"][n]) + 1 for n in range(len(index))}
    ledger = index.left_out()
    return found, None if any(not entry.key for entry in ledger) else {entry.key for entry in ledger}


def summary(lost: list[set[str]], told: list[Callable[[str], bool]]) -> dict[str, int]:
    """Shards and samples lost, and lost in silence."""
    silent = [{key for key in keys if not was_told(key)} for keys, was_told in zip(lost, told)]
    return {
        "samples_lost": sum(map(len, lost)),
        "shards_with_silent_loss": sum(map(bool, silent)),
        "samples_lost_in_silence": sum(map(len, silent)),
    }


def missing(found: dict[str, int]) -> set[str]:
    """Samples that did not arrive with both members."""
    return {key for key in (f"{n:04d}" for n in range(SAMPLES)) if found.get(key) != 2}


def read_with_peer(python: str, peer: str, folder: Path, count: int) -> dict[str, Any]:
    """Run a peer in a process of its own, in its own environment."""
    command = [python, "-W", "ignore", __file__, "--read-with", peer, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    if done.returncode:
        sys.exit(f"{peer} did not run:\n{done.stderr[-2000:]}")
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers["shards"]) == count
    lost = [missing(found) for found, _ in answers["shards"]]
    told: list[Callable[[str], bool]] = [lambda key, was=was: was for _, was in answers["shards"]]
    return {"version": answers["version"], "seconds": answers["seconds"], **summary(lost, told)}


def serve_peer(peer: str, folder: Path) -> None:
    """In the peer's process: read every shard and print what was found as JSON."""
    read = {"webdataset": with_webdataset, "energon": with_energon}[peer]
    begun = time.perf_counter()
    shards = [read(place) for place in sorted(folder.iterdir())]
    version = importlib.metadata.version({"energon": "megatron-energon"}.get(peer, peer))
    print(json.dumps({"version": version, "seconds": round(time.perf_counter() - begun, 1), "shards": shards}))


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--energon-python", help="a Python that has megatron-energon")
    parser.add_argument("--out", help="a .json file for the raw numbers")
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
        answers = [with_anymal(place, tokenizer) for place in sorted(folder.iterdir())]
        told: list[Callable[[str], bool]] = [lambda key, keys=keys: keys is None or key in keys for _, keys in answers]
        ours = summary([missing(found) for found, _ in answers], told)
        seconds = round(time.perf_counter() - begun, 1)
        version = importlib.metadata.version("megatron-anymal")
        results = {"megatron_anymal": {"version": version, "seconds": seconds, **ours}}
        results["webdataset"] = read_with_peer(sys.executable, "webdataset", folder, arguments.shards)
        if arguments.energon_python:
            results["megatron-energon"] = read_with_peer(arguments.energon_python, "energon", folder, arguments.shards)
        else:
            print("megatron-energon was left out: name a Python that has it with --energon-python (see --help)")
    print(f"{arguments.shards} damaged shards of {SAMPLES} samples, seed {arguments.seed}\n")
    columns = ("version", "samples_lost", "shards_with_silent_loss", "samples_lost_in_silence", "seconds")
    print(f"| reader | {' | '.join(name.replace('_', ' ') for name in columns)} |\n{'|---' * (len(columns) + 1)}|")
    for name, found in results.items():
        print(f"| {name} | {' | '.join(str(found[column]) for column in columns)} |")
    if arguments.out:
        body = {"date": time.strftime("%Y-%m-%d"), "shards": arguments.shards, "seed": arguments.seed, **results}
        Path(arguments.out).write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
