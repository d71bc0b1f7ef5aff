"""Measure the feature cache: SFT steps with it and without, what a hit costs, and how fast entries are read.

    PYTHONPATH=.:tests python benchmarks/feature_cache.py --out results.json

A CLIP-shaped encoder takes about 30 % of a step without the cache. Both sides read the same planned steps in this
process, so that decoding is included, and take turns; times are processor time. The steps are those of a second epoch:
every image is in the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loader_media import jpeg
from measuring import ratio, surroundings, take_turns
from tiny import LLAMA, SPECIAL, WORDS, make_config, make_conversations, make_tokenizer

from megatron_anymal.config import EncoderConfig, ModalityConfig, ProjectorConfig, RunConfig
from megatron_anymal.data.feature_cache import FeatureCache, PieceKey, item_digest
from megatron_anymal.data.records import MediaPart
from megatron_anymal.data.shard_index import MediaBytes
from megatron_anymal.object_storage.cache_folder import cache_folder
from megatron_anymal.parallel import initialize, shutdown
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.feature_cache import use_feature_cache
from megatron_anymal.train.step import train_step

# Required: speedup with a warm cache, cost of a hit relative to encoding, bytes read per processor second.
BARS = {"speedup": 1.35, "hit_share": 0.03, "bytes_per_second": 1e9}
# Samples of a step, and steps of an epoch.
SAMPLES, STEPS = 8, 8


def configuration(folder: Path, layers: int, encoder_layers: int, width: int) -> RunConfig:
    """SFT with adapters on a frozen Llama, and one image per sample."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    makers: Any = {"image": ("jpg", jpeg, {})}
    shards = make_conversations(folder / "shards", tokenizer, STEPS * SAMPLES, ("image",), makers=makers)
    config = make_config(shards, tokenizer, folder / "run")
    llama = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    config.model.language_model.config = {**LLAMA, **llama, "vocab_size": len(SPECIAL) + len(WORDS) + 4}
    config.job, config.model.lora.r = "sft", 8
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": encoder_layers}
    shape |= {"image_size": 224, "patch_size": 14, "num_attention_heads": 8}
    config.model.modalities = {
        "image": ModalityConfig(
            encoder=EncoderConfig("clip", config=shape),
            projector=ProjectorConfig(type="resampler", num_layers=1, num_tokens=64, num_attention_heads=8),
            options={"max_grid": 1},
            placeholder=SPECIAL[2],
        )
    }
    config.model.global_batch_size, config.data.seq_length = SAMPLES, 2048
    config.data.feature_cache.gib, config.data.feature_cache.folder = 4.0, str(folder / "cache")
    return config


class Steps:
    """Training steps of one side, which read their micro-batches themselves."""

    def __init__(self, state: TrainState, *, cached: bool):
        self._state, self._cached = state, cached

    def run(self, number: int) -> None:
        """Read and train one of the steps."""
        data, caches = self._state.train_data, self._state.train_data.reader._caches
        if not self._cached:
            data.reader.use_caches({})
        plan = data.planner.plan(number % STEPS)
        batches = [data.reader[micro_batch] for micro_batch in plan.of_replica(0)]
        assert self._cached != any(len(media.pieces) for batch in batches for media in batch.media.values())
        train_step(self._state, plan, batches)
        data.reader.use_caches(caches)


def compare_steps(state: TrainState, rounds: int) -> dict[str, Any]:
    """Steps without the cache and with a warm one."""
    writer = use_feature_cache(state)
    data = state.train_data
    for number in range(STEPS):
        plan = data.planner.plan(number)
        train_step(state, plan, [data.reader[micro_batch] for micro_batch in plan.of_replica(0)])
    writer.finish()
    encoder: Any = state.models[0].encoders["image"]
    encoding, forward = [], encoder.forward

    def timed(pieces: torch.Tensor) -> torch.Tensor:
        begun = time.process_time()
        features = forward(pieces)
        encoding.append(time.process_time() - begun)
        return features

    encoder.forward = timed
    sides = {"off": Steps(state, cached=False).run, "warm": Steps(state, cached=True).run}
    turns = take_turns(sides, rounds, 1)
    encoder.forward = forward
    assert len(encoding) == rounds + 1, "a step is one micro-batch, which is encoded in one call"
    speedup = ratio(turns["off"].cpu, turns["warm"].cpu)
    off = statistics.median(turns["off"].cpu)
    return {
        "encoder_share": statistics.median(encoding) / off,
        "seconds": {name: statistics.median(turn.cpu) for name, turn in turns.items()},
        "speedup": {"median": speedup.median, "quartiles": [speedup.lower, speedup.upper]},
        "rounds": {name: turn.cpu for name, turn in turns.items()},
        **hit_cost(state, statistics.median(encoding) / SAMPLES),
    }


def hit_cost(state: TrainState, encoding: float, repeats: int = 50) -> dict[str, float]:
    """Processor seconds of a hit (hash of the file, key, read, check) and of encoding a piece."""
    cache: FeatureCache = state.train_data.reader._caches["image"]
    media = MediaBytes(MediaPart("0.jpg", "image"), jpeg(0), "jpg")
    key, out = PieceKey(item_digest(media), 1, 0), torch.empty(cache.shape, dtype=cache.dtype)
    assert cache.read(key, out)
    begun = time.process_time()
    for _ in range(repeats):
        cache.read(PieceKey(item_digest(media), 1, 0), out)
    hit = (time.process_time() - begun) / repeats
    return {"hit_seconds": hit, "encoding_seconds": encoding, "hit_share": hit / encoding}


def read_entries(folder: Path, entries: int, shape: tuple[int, int]) -> dict[str, float]:
    """Find and read entries in a random order; processor and clock time."""
    cache = FeatureCache(cache_folder(str(folder)), 2**40, "benchmark", shape, torch.bfloat16)
    features = torch.randn(shape).bfloat16()
    keys = [PieceKey(f"{number:064}", 1, 0) for number in range(entries)]
    for key in keys:
        cache.add(key, features)
    out = torch.empty(shape, dtype=torch.bfloat16)
    order = torch.randperm(entries, generator=torch.Generator().manual_seed(0)).tolist()
    wall, cpu = time.perf_counter(), time.process_time()
    for number in order:
        assert cache.read(keys[number], out)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    size = entries * (cache.entry_bytes - 4)
    return {"entries": entries, "bytes": size, "bytes_per_second": size / cpu, "bytes_per_clock_second": size / wall}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write results to this .json file")
    parser.add_argument("--layers", type=int, default=10, help="layers of the Llama (default: %(default)s)")
    parser.add_argument("--encoder-layers", type=int, default=4, help="layers of the encoder (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=512, help="width of the Llama and the encoder (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--entries", type=int, default=10_000, help="cache entries to read (default: %(default)s)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), arguments.layers, arguments.encoder_layers, arguments.width)
        results = compare_steps(build(config, initialize(config)), arguments.rounds)
        shutdown()
        # Features of CLIP ViT-L/14 at 224 pixels take 256 x 1,024 numbers.
        results["reading"] = read_entries(Path(folder) / "entries", arguments.entries, (256, 1024))
    results.update(surroundings())
    print_results(results)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


def print_results(results: dict[str, Any]) -> None:
    """Print the numbers and their bars."""
    reading = results["reading"]
    print(f"encoder: {results['encoder_share']:.1%} of a step without the cache")
    print(f"samples per second with a warm cache: {results['speedup']['median']:.2f} x (bar {BARS['speedup']})")
    print(f"a hit costs {results['hit_share']:.2%} of encoding (bar {BARS['hit_share']:.0%})")
    print(
        f"{reading['entries']:,} entries: {reading['bytes_per_second'] / 1e9:.2f} GB per processor second "
        f"(bar {BARS['bytes_per_second'] / 1e9:.0f}), {reading['bytes_per_clock_second'] / 1e9:.2f} by the clock"
    )


if __name__ == "__main__":
    main()
