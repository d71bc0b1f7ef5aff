"""Measure a training step: a frozen Llama against a trained one, and this trainer against bare megatron-core.

    python benchmarks/step.py --out results.json

Both comparisons run in one process, in fp32, on the same batches; the sides alternate step by step, so that other load
on the machine affects them equally. Planning and reading batches is timed separately.

The floor is in bare_megatron.py: a GPTModel of megatron-core with the same configuration, layers, weights, documents
and optimizer, and no media. This trainer's runs additionally have an identity encoder and one linear projector.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from anymal_side import Batches, Ours, StepSizes, make_config, work_by_hand, write_data
from bare_megatron import Bare
from measuring import (
    Turns,
    add_arguments,
    ratio,
    saved_for_backward,
    stored_bytes,
    surroundings,
    take_turns,
    timed,
)
from torch.utils.flop_counter import FlopCounterMode

from megatron_anymal.parallel import initialize, shutdown
from megatron_anymal.train.build import build

# Largest acceptable overhead over bare megatron-core.
BAR = 0.05
KINDS = {"frozen": True, "trained": False}


def counted_products(side: Ours | Bare) -> int:
    """FLOPs of the matrix products of a step, without attention, as counted by torch."""
    with FlopCounterMode(display=False) as counter:
        side.step(0)
    return int(sum(counter.get_flop_counts()["Global"].values()))


def saved_bytes(ours: Ours) -> int:
    """Bytes that the forward pass of one micro-batch saves for the backward pass, without weights."""
    wrapped, micro_batch = ours.state.wrapped[0], ours.batches[0][1][0]
    kept, _ = saved_for_backward(lambda: wrapped(micro_batch, labels=micro_batch.labels), wrapped.parameters())
    return sum(kept.values())


def compare_frozen(
    sizes: StepSizes, ours: dict[str, Ours], turns: dict[str, Turns], updates: dict[str, list[float]]
) -> dict[str, Any]:
    """Compare a frozen Llama with a trained one.

    Args:
        updates: optimizer seconds in each round.
    """
    walls = {kind: turns[f"ours, {kind}"].wall for kind in KINDS}
    without = {kind: [a - b for a, b in zip(walls[kind], updates[kind], strict=True)] for kind in KINDS}
    results: dict[str, Any] = {}
    for kind, freeze in KINDS.items():
        state, work = ours[kind].state, work_by_hand(sizes, freeze)
        stored = stored_bytes(state.models[0], state.wrapped[0], state.optimizer)
        results[kind] = {
            "seconds": statistics.median(walls[kind]),
            "optimizer_seconds": statistics.median(updates[kind]),
            "seconds_without_optimizer": statistics.median(without[kind]),
            "flops": work.total,
            "products": work.products + work.projector,
            "products_counted": counted_products(ours[kind]),
            "stored": sum(stored.values()),
            "stored_bytes": stored,
            "saved_bytes": saved_bytes(ours[kind]),
        }
    frozen, trained = results["frozen"], results["trained"]
    by_flops = trained["flops"] / frozen["flops"]
    results["ratio"] = {
        "seconds": asdict(ratio(walls["trained"], walls["frozen"])),
        "cpu_seconds": asdict(ratio(turns["ours, trained"].cpu, turns["ours, frozen"].cpu)),
        "without_optimizer": asdict(ratio(without["trained"], without["frozen"])),
        "by_flops": by_flops,
        "by_flops_and_optimizer": (by_flops * frozen["seconds_without_optimizer"] + trained["optimizer_seconds"])
        / (frozen["seconds_without_optimizer"] + frozen["optimizer_seconds"]),
    }
    return results


def compare_bare(turns: dict[str, Turns], bare: dict[str, Bare]) -> dict[str, Any]:
    """Compare this trainer with the floor."""
    results = {}
    for kind in KINDS:
        ours, floor = turns[f"ours, {kind}"], turns[f"bare, {kind}"]
        results[kind] = {
            "seconds": statistics.median(ours.wall),
            "bare_seconds": statistics.median(floor.wall),
            "ratio": asdict(ratio(ours.wall, floor.wall)),
            "cpu_ratio": asdict(ratio(ours.cpu, floor.cpu)),
            "bare_products_counted": counted_products(bare[kind]),
        }
    return results


def measure(sizes: StepSizes) -> dict[str, Any]:
    """Run all measurements; returns the results with raw seconds."""
    environment = surroundings()
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), sizes)
        configs = {kind: make_config(Path(folder), sizes, freeze) for kind, freeze in KINDS.items()}
        layout = initialize(configs["frozen"])
        states = {kind: build(config, layout) for kind, config in configs.items()}
        batches = {kind: Batches(state, sizes.batches) for kind, state in states.items()}
    ours = {kind: Ours(states[kind], batches[kind]) for kind in KINDS}
    bare = {kind: Bare(side.state, side.batches) for kind, side in ours.items()}
    updates = {kind: timed(side.state.optimizer, "step") for kind, side in ours.items()}
    sides: dict[str, Any] = {}
    for kind in KINDS:
        sides |= {f"ours, {kind}": ours[kind].step, f"bare, {kind}": bare[kind].step}
    turns = take_turns(sides, sizes.rounds, sizes.warm_up)
    updates = {kind: seconds[sizes.warm_up :] for kind, seconds in updates.items()}
    results = {
        **environment,
        "device": layout.device.type,
        "sizes": {**asdict(sizes), "tokens": sizes.tokens, "parameters": work_by_hand(sizes, True).parameters},
        "floor": "a step of megatron-core's GPTModel alone: benchmarks/bare_megatron.py",
        "frozen_against_trained": compare_frozen(sizes, ours, turns, updates),
        "ours_against_bare": compare_bare(turns, bare),
        "outside_the_step": {
            "planning_seconds": statistics.median(batches["frozen"].planning),
            "reading_seconds": statistics.median(batches["frozen"].reading),
        },
        "rounds": {name: asdict(turn) for name, turn in turns.items()},
    }
    shutdown()
    return results


def row(name: str, left: float, right: float, measured: float | dict[str, float]) -> str:
    """Row of the first table; a measured ratio is followed by its quartiles and the ratio of the fastest rounds."""
    if isinstance(measured, dict):
        middle = measured["median"]
        spread = f"  {measured['lower']:.3f} to {measured['upper']:.3f}, {measured['fastest']:.3f}"
    else:
        middle, spread = measured, ""
    return f"{name:<44}{left:>10.3f}{right:>10.3f}{middle:>8.3f}{spread}"


def frozen_table(frozen: dict[str, Any]) -> list[str]:
    """Format the comparison of a frozen with a trained Llama."""
    ratios = frozen["ratio"]

    def both(scale: float, *keys: str) -> tuple[float, float]:
        left, right = (reduce(getitem, keys, frozen[kind]) / scale for kind in KINDS)
        return left, right

    counted, kept = both(1e9, "products_counted"), both(2**20, "saved_bytes")
    lines = [
        f"{'Frozen against trained Llama':<44}{'frozen':>10}{'trained':>10}{'ratio':>8}  quartiles, fastest rounds",
        row("step, s", *both(1, "seconds"), ratios["seconds"]),
        f"{'  in CPU time':<64}{ratios['cpu_seconds']['median']:>8.3f}",
        row("step without the optimizer, s", *both(1, "seconds_without_optimizer"), ratios["without_optimizer"]),
        row("  predicted: 4N, 6N/token + attention, GFLOP", *both(1e9, "flops"), ratios["by_flops"]),
        row("  matrix products counted by torch, GFLOP", *counted, counted[1] / counted[0]),
        f"{'step predicted, with the measured optimizer':<64}{ratios['by_flops_and_optimizer']:>8.3f}",
    ]
    for kind in ("weights", "gradients", "moments"):
        left, right = both(2**20, "stored_bytes", kind)
        lines.append(row(f"{kind}, MiB", left, right, right / left))
    stored = both(2**20, "stored")
    return [
        *lines,
        row("stored in total, MiB", *stored, stored[1] / stored[0]),
        row("saved for backward of one pack, MiB", *kept, kept[1] / kept[0]),
    ]


def overhead(measured: dict[str, float]) -> str:
    """A ratio minus one, with its quartiles and the ratio of the fastest rounds."""
    lower, middle, upper, fastest = (f"{measured[of] - 1:.2%}" for of in ("lower", "median", "upper", "fastest"))
    return f"{middle:>8}  {lower} to {upper}, {fastest}"


def bare_table(against: dict[str, Any]) -> list[str]:
    """Format the comparison of this trainer with the floor."""
    lines = [
        f"{'This trainer against bare megatron-core':<44}{'bare':>10}{'ours':>10}{'over':>8}  quartiles, fastest rounds"
    ]
    for kind, side in against.items():
        times = f"{side['bare_seconds']:>10.3f}{side['seconds']:>10.3f}"
        lines.append(f"{f'{kind} Llama: step, s':<44}{times}{overhead(side['ratio'])}")
        lines.append(f"{'  in CPU time':<64}{overhead(side['cpu_ratio'])}")
    return [*lines, verdict(against)]


def verdict(against: dict[str, Any]) -> str:
    """Whether the overhead is within the bar; by CPU time if other load disturbed the wall clock too much."""
    for clock, ratio_of in (("wall clock", "ratio"), ("CPU time", "cpu_ratio")):
        measured = [side[ratio_of] for side in against.values()]
        if all(of["upper"] - of["lower"] <= BAR for of in measured):
            within = all(of["median"] <= 1 + BAR for of in measured)
            return f"{'within' if within else 'ABOVE'} the bar of {BAR:.0%} by {clock}"
    return f"no verdict: the quartiles are further apart than the bar of {BAR:.0%}. Run it again on an idle machine."


def report(results: dict[str, Any]) -> str:
    """Format the results as text."""
    sizes, outside = results["sizes"], results["outside_the_step"]
    return "\n".join(
        [
            f"{results['date']}; {results['machine']}; {results['threads']} threads; "
            f"load before: {results['load']:.1f}",
            ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
            f"fp32; {sizes['layers']} layers of width {sizes['hidden']}, {sizes['parameters'] / 1e6:.1f} M parameters "
            f"in matrix products; {sizes['tokens']} tokens/step in {sizes['packs']} packs; {sizes['rounds']} rounds",
            f"floor: {results['floor']}",
            "",
            *frozen_table(results["frozen_against_trained"]),
            "",
            *bare_table(results["ours_against_bare"]),
            "",
            f"outside the step: planning {outside['planning_seconds'] * 1e3:.2f} ms, reading "
            f"{outside['reading_seconds'] * 1e3:.2f} ms (in this process, without workers)",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file for the results, including raw numbers")
    add_arguments(parser, StepSizes)
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    if arguments["rounds"] < 2:
        parser.error("--rounds must be at least 2, to compute quartiles.")
    if out and not Path(out).resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {str(Path(out).parent)!r}.")
    results = {"command": " ".join(["python benchmarks/step.py", *argv]), **measure(StepSizes(**arguments))}
    print(report(results))
    if out:
        Path(out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
