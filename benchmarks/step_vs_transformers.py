"""Compare a training step with the same step in transformers and plain torch.

    OMP_NUM_THREADS=1 python benchmarks/step_vs_transformers.py --out results.json

The model is the quickstart's alignment on one process, at its own width and at 8 times the width: a frozen Llama (with
random weights), frozen image and IMU encoders, trained projectors, fp32, one thread. Both sides start from the same
weights and train on the same samples; first their losses must be equal over several steps. Then they alternate step by
step, and the processor time of this process is compared. The floor is in transformers_side.py: documents packed as
here, or one per row, whichever is faster.

Also counted are the torch operations of a step, which are about the kernels that a GPU would launch, and the waits for
values, at which a GPU would be synchronized with the host.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from anymal_side import Batches, Ours
from measuring import Dispatched, ratio, surroundings, take_turns
from transformers_side import Transformers, packed, rows

from examples.quickstart.media import Sizes as MediaSizes
from examples.quickstart.prepare import prepare_quickstart
from megatron_anymal.config import RunConfig
from megatron_anymal.config.compose import compose, default_config_dir
from megatron_anymal.parallel import initialize, shutdown
from megatron_anymal.train.build import build

# Width of the Llama, relative to the quickstart's -> smallest acceptable ratio of tokens per processor second.
BARS = {1: 1.0, 8: 1.2}
# Largest relative difference between the losses of both sides.
TOLERANCE = 1e-5
FLOOR = "LlamaForCausalLM with sdpa, plain torch projectors, fused AdamW: benchmarks/transformers_side.py"
ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {"packed": packed, "rows": rows}


@dataclass(frozen=True)
class Repetitions:
    """Repetitions; every field is an argument of the command."""

    # Different batches, used in turn.
    batches: int = 4
    # Steps whose losses are compared.
    checked_steps: int = 5
    warm_up: int = 2
    rounds: int = 20
    # Samples per step; 0: the quickstart's number.
    samples: int = 0


def make_config(width: int, samples: int) -> RunConfig:
    """The quickstart's alignment on one process, with frozen encoders and `width` times the Llama's width."""
    config, llama = (compose(name, default_config_dir(), ()).config for name in ("quickstart", "quickstart_llama"))
    config.trainer.devices = config.model.tensor_model_parallel_size = 1
    config.model.language_model.checkpoint = ""
    sizes = config.model.language_model.config = dict(llama.model.language_model.config)
    for key in ("hidden_size", "intermediate_size"):
        sizes[key] *= width
    # Heads of a wider Llama are more and larger: 32 wide at width 1, 64 at width 8.
    for key in ("num_attention_heads", "num_key_value_heads"):
        sizes[key] = sizes[key] if width == 1 else sizes[key] * width // 2
    config.model.modalities["imu"].encoder.freeze = True
    config.model.global_batch_size = samples or config.model.global_batch_size
    return config


def compare_losses(ours: Ours, theirs: Mapping[str, Transformers], steps: int) -> list[dict[str, float]]:
    """Train all sides for some steps; returns their losses.

    Raises:
        SystemExit: they differ.
    """
    losses = []
    for number in range(steps):
        losses.append({"anymal": ours.step(number).loss, **{name: side.step(number) for name, side in theirs.items()}})
        for name, loss in losses[-1].items():
            if abs(loss - losses[-1]["anymal"]) > TOLERANCE * abs(loss):
                sys.exit(
                    f"step {number}: this trainer's loss is {losses[-1]['anymal']:.7f}, transformers' ({name}) is "
                    f"{loss:.7f}."
                )
    return losses


def measure(width: int, repetitions: Repetitions) -> dict[str, Any]:
    """Compare the sides at one width; the current folder holds the quickstart's inputs."""
    config = make_config(width, repetitions.samples)
    state = build(config, initialize(config))
    batches = Batches(state, repetitions.batches)
    ours = Ours(state, batches)
    theirs = {name: Transformers(state, batches, lay_out) for name, lay_out in LAYOUTS.items()}
    losses = compare_losses(ours, theirs, repetitions.checked_steps)
    sides: dict[str, Any] = {"anymal": ours.step, **{name: side.step for name, side in theirs.items()}}
    turns = take_turns(sides, repetitions.rounds, repetitions.warm_up)
    tokens = statistics.mean(int(plan.length.sum()) for plan, _ in batches)
    operations = {name: count_operations(step) for name, step in sides.items()}
    shutdown()
    return {
        "llama": config.model.language_model.config,
        "losses": losses,
        "tokens": tokens,
        "documents": [[m.document_lengths for m in micro_batches] for _, micro_batches in batches],
        "tokens_per_cpu_second": {name: tokens / statistics.median(turn.cpu) for name, turn in turns.items()},
        # All sides take the same batch in a round.
        "ratios": {name: asdict(ratio(turns[name].cpu, turns["anymal"].cpu)) for name in theirs},
        "operations": operations,
        "rounds": {name: asdict(turn) for name, turn in turns.items()},
    }


def count_operations(step: Callable[[int], Any]) -> dict[str, Any]:
    """Count the torch operations of a step, and how often it waits for the device, by line."""
    with Dispatched() as counted:
        step(0)
    lines = {os.path.relpath(line, ROOT): number for line, number in counted.waits.items()}
    return {"operations": counted.operations, "waits": sum(lines.values()), "lines": lines}


def report(found: dict[str, Any]) -> str:
    """Format the results as text."""
    lines = [
        f"{found['date']}; {found['machine']}; {found['threads']} thread(s); load before: {found['load']:.1f}",
        ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"floor: {FLOOR}",
    ]
    for width, side in found["widths"].items():
        lines += ["", *table(int(width), side)]
    return "\n".join(lines)


def table(width: int, side: dict[str, Any]) -> list[str]:
    """Format the results of one width."""
    head = f"width x {width}, {side['tokens']:.0f} tokens/step"
    lines = [f"{head:<36}{'operations':>12}{'waits':>7}{'tokens/CPU s':>14}{'ratio':>8}  quartiles, fastest rounds"]
    for name, rate in side["tokens_per_cpu_second"].items():
        counts = side["operations"][name]
        line = f"{name if name == 'anymal' else f'transformers, {name}':<36}"
        line += f"{counts['operations']:>12}{counts['waits']:>7}{rate:>14.0f}"
        if name in side["ratios"]:
            of = side["ratios"][name]
            line += f"{of['median']:>8.2f}  {of['lower']:.2f} to {of['upper']:.2f}, {of['fastest']:.2f}"
        lines.append(line)
    largest = max(abs(loss / losses["anymal"] - 1) for losses in side["losses"] for loss in losses.values())
    slowest = min(side["ratios"].values(), key=lambda of: float(of["median"]))
    return [*lines, f"losses of {len(side['losses'])} steps differ by {largest:.1e}; {verdict(width, slowest)}"]


def verdict(width: int, measured: dict[str, float]) -> str:
    """Whether the ratio reaches the bar, if this width has one."""
    if width not in BARS:
        return "no bar"
    reached = measured["median"] >= BARS[width]
    return f"{'reaches' if reached else 'BELOW'} the bar of {BARS[width]}"


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file for the results, including raw numbers")
    parser.add_argument("--width", type=int, action="append", help="times the quickstart's width (default: 1 and 8)")
    for field in fields(Repetitions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = vars(parser.parse_args(argv))
    out, widths = arguments.pop("out"), arguments.pop("width") or list(BARS)
    repetitions = Repetitions(**arguments)
    if repetitions.rounds < 2:
        parser.error("--rounds must be at least 2, to compute quartiles.")
    if out and not Path(out).resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {str(Path(out).parent)!r}.")
    torch.set_num_threads(1)
    found = {"command": " ".join(["python benchmarks/step_vs_transformers.py", *argv]), **surroundings()}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        media = MediaSizes(80, 1, 1, 80, 1, 80, 1)
        prepare_quickstart(Path("runs/quickstart"), media, encoder_steps=1)
        found["widths"] = {str(width): measure(width, repetitions) for width in widths}
    print(report(found))
    if out:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
