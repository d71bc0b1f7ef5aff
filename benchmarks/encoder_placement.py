"""Measure a pipeline's step with encoders on all stages against encoders on the first one.

    PYTHONPATH=.:tests python benchmarks/encoder_placement.py --out results.json

Four stages in four gloo processes. Each layer and each encoder call sleeps, so that the schedule and not this machine
decides: the encoder takes 25 % of what the first stage takes for a micro-batch. Both placements take turns, and the
fastest step of each counts, since other load only adds time. The floor is the simulated schedule in which the encoder
costs nothing, over the one in which the first stage runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import ratio, surroundings
from ranks import run_ranks
from tiny import make_config, make_shards, make_tokenizer

from megatron_anymal.config import RunConfig
from megatron_anymal.planning.layouts.simulation import simulate

# Acceptable ratio of the step times.
BAR = 0.85
STAGES, LAYERS, MICRO_BATCHES = 4, 8, 16
# Seconds that a layer sleeps in its forward pass; its backward pass takes twice as long.
DELAY = 0.03
# The encoder's seconds per micro-batch: a quarter of the first stage's total; its layers take the other three quarters.
ENCODER = 3 * DELAY * LAYERS / STAGES / 3
# Steps of a turn. The first step encodes its media when it begins, and the last one encodes nothing ahead.
STEPS = 4


def configuration(folder: Path) -> RunConfig:
    """Micro-batches of one sample with one image each."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    shards = make_shards(folder / "shards", tokenizer, MICRO_BATCHES, ("image",))
    config = make_config(shards, tokenizer, folder / "run")
    model = config.model
    model.modalities = {"image": model.modalities["image"]}
    # Enough soft tokens that two samples do not fit into a pack.
    model.modalities["image"].projector.num_tokens, config.data.seq_length = 24, 44
    model.language_model.config["num_hidden_layers"], model.language_model.freeze = LAYERS, False
    model.global_batch_size = MICRO_BATCHES
    config.trainer.devices = model.pipeline_model_parallel_size = STAGES
    return config


def timed_steps(config: RunConfig) -> tuple[int, list[float], list[float]]:
    """In a rank: micro-batches per step, and seconds and loss of each step."""
    from megatron_anymal.data.loader import steps
    from megatron_anymal.parallel import initialize
    from megatron_anymal.train.build import build
    from megatron_anymal.train.stage_encoding import with_coming
    from megatron_anymal.train.step import train_step

    state = build(config, initialize(config))

    def slow(module: Any, given: Any, output: Any) -> None:
        time.sleep(DELAY)
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda gradient: time.sleep(2 * DELAY))

    for layer in state.models[0].language_model.decoder.layers:
        layer.register_forward_hook(slow)
    encoding = state.stage_encoding
    for encoder in (encoding.encoders if encoding else dict(state.models[0].encoders)).values():
        encoder.register_forward_hook(lambda module, given, output: time.sleep(ENCODER))
    data, seconds, losses = state.train_data, [], []
    planned = steps(data.planner, data.reader, replica=0, start=0, stop=STEPS, num_workers=0, prefetch_steps=1)
    for plan, batches, coming in with_coming(planned, ahead=encoding is not None):
        begun = time.perf_counter()
        losses.append(train_step(state, plan, batches, coming).loss)
        seconds.append(time.perf_counter() - begun)
    return len(batches), seconds, losses


def simulated(encoder: float) -> float:
    """Seconds of the schedule if the first stage encodes in its forward passes."""
    forward = DELAY * LAYERS / STAGES
    passes = [[(forward + encoder * (stage == 0), 2 * forward)] for stage in range(STAGES)]
    return simulate(passes, MICRO_BATCHES, 0.0).seconds


def measured(turns: int) -> dict[str, Any]:
    """Measure both placements in turns."""
    taken: dict[str, list[float]] = {"first_stage": [], "all_stages": []}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder))
        for turn in range(turns):
            for placement in list(taken)[:: 1 if turn % 2 == 0 else -1]:
                config.model.encoder_placement = placement
                ranks = run_ranks(STAGES, timed_steps, config)
                assert all(rank[0] == MICRO_BATCHES for rank in ranks)
                steps = [max(rank[1][number] for rank in ranks) for number in range(1, STEPS - 1)]
                taken[placement].append(min(steps))
                losses[placement] = ranks[0][2]
    assert losses["first_stage"] == losses["all_stages"]
    return {
        "seconds": taken,
        "ratio": asdict(ratio(taken["all_stages"], taken["first_stage"])),
        "simulated_seconds": {"first_stage": simulated(ENCODER), "without_encoder": simulated(0.0)},
        "floor": simulated(0.0) / simulated(ENCODER),
        "bar": BAR,
    }


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--turns", type=int, default=3, help="turns of each placement, at least 2 (default: %(default)s)"
    )
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args(argv)
    results = measured(arguments.turns)
    first, spread = (min(results["seconds"][name]) for name in ("first_stage", "all_stages"))
    print(
        f"first_stage {first:.3f} s (simulated {results['simulated_seconds']['first_stage']:.3f} s), all_stages "
        f"{spread:.3f} s: ratio {results['ratio']['fastest']:.3f}, floor {results['floor']:.3f}, bar {BAR}"
    )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"surroundings": surroundings(), **results}, indent=1) + "\n")
    return int(results["ratio"]["fastest"] > BAR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
