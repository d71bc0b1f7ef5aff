"""Measure several alignments in one run against the same ones one after the other.

    PYTHONPATH=.:tests python benchmarks/multiplex.py --out results.json

A pipeline of four stages in four gloo processes, with Table 11's ratio of batches (image 2048, audio 128, video 1024,
IMU 256). Each layer sleeps for a time in proportion to the token positions of a micro-batch, so that the schedule and
not this machine decides, and its backward pass twice as long. Both sides take turns, and the fastest turn of each
counts, since other load only adds time. The floor is counted from the plans of both: token positions of the
micro-batches that a stage works on or waits for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import ratio, surroundings
from multiplexed import NAMES, alone, make_data, multiplexed_config
from ranks import run_ranks
from tiny import make_tokenizer

from megatron_anymal.config import RunConfig

# Acceptable ratio of the times.
BAR = 0.8
STAGES, LAYERS = 4, 4
# Steps of a turn; the first is not timed.
STEPS = 5
# Table 11's steps, in hundreds.
ENDS = {"image": 1000, "audio": 10, "video": 200, "imu": 20}


def configuration(folder: Path) -> RunConfig:
    """Batches of 16, 1, 8 and 2 samples; a pack holds about eight."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    config = multiplexed_config(make_data(folder, tokenizer), tokenizer, folder / "run")
    config.model.language_model.config["num_hidden_layers"] = LAYERS
    config.trainer.devices = config.model.pipeline_model_parallel_size = STAGES
    config.trainer.max_steps = STEPS
    return config


def timed_steps(config: RunConfig, seconds_per_position: float) -> tuple[list[float], dict[str, list[float]]]:
    """In a rank: seconds of each step, and losses of each alignment.

    Args:
        seconds_per_position: seconds that a layer sleeps in its forward pass.
    """
    from megatron_anymal.data.loader import steps
    from megatron_anymal.parallel import initialize
    from megatron_anymal.train.build import build
    from megatron_anymal.train.step import train_step

    state = build(config, initialize(config))

    def slow(module: Any, given: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        delay = seconds_per_position * hidden.size(0)
        time.sleep(delay)
        hidden.register_hook(lambda gradient: time.sleep(2 * delay))

    for layer in state.models[0].language_model.decoder.layers:
        layer.register_forward_hook(slow)
    data, seconds = state.train_data, []
    losses: dict[str, list[float]] = {}
    for plan, batches in steps(
        data.planner, data.reader, replica=0, start=0, stop=STEPS, num_workers=0, prefetch_steps=1
    ):
        begun = time.perf_counter()
        result = train_step(state, plan, batches)
        seconds.append(time.perf_counter() - begun)
        for name, loss in result.loss_by_modality.items():
            losses.setdefault(name, []).append(loss)
    return seconds, losses


def counted(config: RunConfig) -> dict[str, float]:
    """In a rank: amounts that the steps of a run compute, counted from its plans.

    Returns:
        Steps, micro-batches, token positions of these, and positions that a stage works on or waits for.
    """
    from megatron_anymal.parallel import initialize
    from megatron_anymal.train.build import build

    planner, total = build(config, initialize(config)).train_data.planner, dict.fromkeys(COUNTS, 0.0)
    for step in range(config.trainer.max_steps):
        plan = planner.plan(step)
        [packs] = map(len, plan.micro_batches)
        for name, value in zip(
            COUNTS, (1, packs, packs * plan.padded_length, (packs + STAGES - 1) * plan.padded_length)
        ):
            total[name] += value
    return total


COUNTS = ("steps", "micro_batches", "positions", "schedule_positions")


def counts_of(config: RunConfig) -> dict[str, dict[str, float]]:
    """The counts of both sides."""
    config.trainer.devices = config.model.pipeline_model_parallel_size = 1
    parts = [run_ranks(1, counted, alone(config, name))[0] for name in NAMES]
    separate = {name: sum(part[name] for part in parts) for name in COUNTS}
    return {"together": run_ranks(1, counted, config)[0], "separate": separate}


def measured(turns: int, seconds_per_position: float) -> dict[str, Any]:
    """Measure both sides in turns, and count what they compute."""
    taken: dict[str, list[float]] = {"separate": [], "together": []}
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder))
        for turn in range(turns):
            by_side: dict[str, dict[str, list[float]]] = {}
            for side in list(taken)[:: 1 if turn % 2 == 0 else -1]:
                runs = [config] if side == "together" else [alone(config, name) for name in NAMES]
                ranks = [run_ranks(STAGES, timed_steps, run, seconds_per_position) for run in runs]
                # A step ends when its slowest rank finishes it.
                taken[side].append(sum(max(step) for run in ranks for step in zip(*(rank[0][1:] for rank in run))))
                by_side[side] = {name: losses for run in ranks for name, losses in run[-1][1].items()}
            apart = largest_difference(by_side["together"], by_side["separate"])
            assert apart < 1e-6, apart
        equal = counts_of(config)
        for name, last in ENDS.items():
            config.model.multiplex[name].max_steps = last
        config.trainer.max_steps = max(ENDS.values())
        ended = counts_of(config)
    return {
        "seconds": taken,
        "ratio": asdict(ratio(taken["together"], taken["separate"])),
        "losses_apart": apart,
        "counts": equal,
        "floor": share(equal),
        "counts_with_ends": ended,
        "floor_with_ends": share(ended),
        "bar": BAR,
    }


def largest_difference(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> float:
    """Largest relative difference between two losses."""
    assert one.keys() == other.keys() == set(NAMES)
    return max(abs(a - b) / abs(b) for name in NAMES for a, b in zip(one[name], other[name], strict=True))


def share(counts: Mapping[str, Mapping[str, float]]) -> float:
    """Time of the alignments together over that of separate runs, if only the schedule takes time."""
    return counts["together"]["schedule_positions"] / counts["separate"]["schedule_positions"]


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="turns of each side, at least 2 (default: %(default)s)")
    parser.add_argument(
        "--milliseconds",
        type=float,
        default=4.0,
        help="milliseconds that a layer sleeps per token position (default: %(default)s)",
    )
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args(argv)
    results = measured(arguments.turns, arguments.milliseconds / 1e3)
    for side, counts in results["counts"].items():
        print(
            f"{side}: {min(results['seconds'][side]):.3f} s; {counts['steps']:.0f} steps, "
            f"{counts['micro_batches']:.0f} micro-batches, {counts['positions']:,.0f} token positions, "
            f"{counts['schedule_positions']:,.0f} with the pipeline's bubbles"
        )
    print(
        f"ratio {results['ratio']['fastest']:.3f}, floor {results['floor']:.3f}, bar {BAR}; with Table 11's own ends "
        f"the floor is {results['floor_with_ends']:.3f}; losses differ by at most {results['losses_apart']:.1e}"
    )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"surroundings": surroundings(), **results}, indent=1) + "\n")
    return int(results["ratio"]["fastest"] > BAR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
