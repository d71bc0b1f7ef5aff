"""Compare a training step with the same step in transformers and plain torch.

    OMP_NUM_THREADS=1 python benchmarks/step_vs_transformers.py --out results.json

Cases, each on one process with one thread in fp32:

quickstart, quickstart_wide: the quickstart's alignment with frozen encoders, at its own width and at 8 times the width
alignment: captions with media of 64 soft tokens; hidden size 512, 8 layers, a vocabulary of 32,000
sft: conversations about such media, with LoRA of rank 8 on all linear layers; the same Llama

Both sides start from the same weights (random, also those of the adapters) and train on the same samples; first the
gradients of a step and the losses of several steps must be equal. Then they alternate step by step, and the processor
time of this process is compared. The floor is in transformers_side.py.

Also counted are the floating-point operations of a step; its torch operations, roughly the kernels that a GPU would
launch; and the waits for values, at which a GPU would be synchronized with the host.
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
from captions_and_chats import MixedSizes, make_case
from flop_count import counted_flops
from measuring import Dispatched, add_arguments, ratio, surroundings, take_turns
from transformers_side import Transformers, packed, packed_with_kept_logits, rows, rows_with_kept_logits

from examples.quickstart.media import QuickstartSizes as MediaSizes
from examples.quickstart.prepare import prepare_quickstart
from megatron_anymal.config import RunConfig
from megatron_anymal.config.compose import compose, default_config_dir
from megatron_anymal.model.unsharded_weights import list_weights
from megatron_anymal.parallel import initialize, shutdown
from megatron_anymal.train.build import TrainState, build

# Largest relative difference between both sides' losses, and between their gradients (norm of the difference).
TOLERANCE = 1e-5
FLOOR = "LlamaForCausalLM with sdpa, plain torch projectors, peft, fused AdamW: benchmarks/transformers_side.py"
ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {
    "packed": packed,
    "packed, kept logits": packed_with_kept_logits,
    "rows": rows,
    "rows, kept logits": rows_with_kept_logits,
}


@dataclass(frozen=True)
class Repetitions:
    """Repetitions; every field is an argument of the command."""

    batches: int = 4
    """Different batches, used in turn."""
    checked_steps: int = 5
    """Steps whose losses are compared."""
    warm_up: int = 2
    """Rounds before the timed ones."""
    rounds: int = 20
    """Timed rounds, at least 2."""
    samples: int = 0
    """Samples per step of the quickstart's cases; 0: the quickstart's number."""


@dataclass(frozen=True)
class LayoutCase:
    """A comparison: its layouts in transformers, and the smallest acceptable ratio of tokens per processor second to
    those with the same packs."""

    layouts: tuple[str, ...]
    bar: float


FASTEST = ("packed", "packed, kept logits", "rows, kept logits")
CASES = {
    "quickstart": LayoutCase(("packed", "rows"), 1.0),
    "quickstart_wide": LayoutCase(("packed", "rows"), 1.2),
    "alignment": LayoutCase(FASTEST, 1.5),
    "sft": LayoutCase(FASTEST, 1.3),
}


def make_config(name: str, sizes: MixedSizes, repetitions: Repetitions) -> RunConfig:
    """Write a case's data into the current folder, unless they are there; return its configuration."""
    if name in ("alignment", "sft"):
        job = "sft" if name == "sft" else "pretrain"
        return make_case(Path(name), job, sizes, repetitions.batches)
    if not Path("runs/quickstart").is_dir():
        prepare_quickstart(Path("runs/quickstart"), MediaSizes(80, 1, 1, 80, 1, 80, 1), encoder_steps=1)
    return quickstart_config(1 if name == "quickstart" else 8, repetitions.samples)


def quickstart_config(width: int, samples: int) -> RunConfig:
    """The quickstart's alignment on one process, with frozen encoders and `width` times the Llama's width."""
    config, llama = (compose(name, default_config_dir(), ()).config for name in ("quickstart", "quickstart_llama"))
    config.trainer.devices = config.model.tensor_model_parallel_size = 1
    config.model.language_model.checkpoint = ""
    sizes = config.model.language_model.config = dict(llama.model.language_model.config)
    for key in ("hidden_size", "intermediate_size"):
        sizes[key] *= width
    # A wider Llama has more and larger heads: of size 32 at width 1, 64 at width 8.
    for key in ("num_attention_heads", "num_key_value_heads"):
        sizes[key] = sizes[key] if width == 1 else sizes[key] * width // 2
    config.model.modalities["imu"].encoder.freeze = True
    config.model.global_batch_size = samples or config.model.global_batch_size
    return config


def compare_losses(
    ours: Ours, theirs: Mapping[str, Transformers], steps: int, first: int = 0
) -> list[dict[str, float]]:
    """Train all sides for some steps, from batch `first` on; returns their losses.

    Raises:
        SystemExit: they differ.
    """
    losses = []
    for number in range(first, first + steps):
        losses.append({"anymal": ours.step(number).loss, **{name: side.step(number) for name, side in theirs.items()}})
        for name, loss in losses[-1].items():
            if abs(loss - losses[-1]["anymal"]) > TOLERANCE * abs(loss):
                sys.exit(
                    f"step {number}: this trainer's loss is {losses[-1]['anymal']:.7f}, transformers' ({name}) is "
                    f"{loss:.7f}."
                )
    return losses


def compare_gradients(state: TrainState, theirs: Mapping[str, Transformers]) -> dict[str, float]:
    """Compare the gradients of the last step of all sides, after clipping.

    Returns:
        Norm of the difference to this trainer's, relative, by side.

    Raises:
        SystemExit: they differ.
    """
    weights: dict[str, Any] = {w.name: w.parameter for w in list_weights(state.models[0]) if w.parameter.requires_grad}
    ours = torch.cat([parameter.main_grad.flatten() for parameter in weights.values()])
    differences = {}
    for name, side in theirs.items():
        gradients = side.gradients()
        other = torch.cat([gradients[weight].flatten() for weight in weights])
        differences[name] = float((ours - other).norm() / ours.norm())
        if differences[name] > TOLERANCE:
            sys.exit(f"this trainer's and transformers' ({name}) gradients differ by {differences[name]:.1e}.")
    return differences


def randomize_adapters(state: TrainState) -> None:
    """Draw the adapters' B, which begin as 0, so that every gradient is compared."""
    generator = torch.Generator().manual_seed(1)
    for weight in list_weights(state.models[0]):
        if weight.name.endswith(".B"):
            weight.parameter.data.normal_(std=0.01, generator=generator)


def measure(name: str, sizes: MixedSizes, repetitions: Repetitions) -> dict[str, Any]:
    """Compare the sides of one case; writes data into the current folder."""
    config = make_config(name, sizes, repetitions)
    state = build(config, initialize(config))
    randomize_adapters(state)
    batches = Batches(state, repetitions.batches)
    ours = Ours(state, batches)
    theirs = {layout: Transformers(state, batches, LAYOUTS[layout]) for layout in CASES[name].layouts}
    losses = compare_losses(ours, theirs, 1)
    gradients = compare_gradients(state, theirs)
    losses += compare_losses(ours, theirs, repetitions.checked_steps - 1, first=1)
    steps: dict[str, Callable[[int], Any]] = {"anymal": ours.step, **{n: side.step for n, side in theirs.items()}}
    turns = take_turns(steps, repetitions.rounds, repetitions.warm_up)
    tokens = statistics.mean(int(plan.length.sum()) for plan, _ in batches)
    operations = {side: count_operations(step) for side, step in steps.items()}
    shutdown()
    return {
        "llama": config.model.language_model.config,
        "losses": losses,
        "gradient_differences": gradients,
        "tokens": tokens,
        "labels": statistics.mean(int(plan.targets.sum()) for plan, _ in batches),
        # Of the batch whose operations are counted.
        "counted_labels": int(batches[0][0].targets.sum()),
        "documents": [[m.document_lengths for m in micro_batches] for _, micro_batches in batches],
        "tokens_per_cpu_second": {side: tokens / statistics.median(turn.cpu) for side, turn in turns.items()},
        # All sides take the same batch in a round.
        "ratios": {side: asdict(ratio(turns[side].cpu, turns["anymal"].cpu)) for side in theirs},
        "operations": operations,
        "rounds": {side: asdict(turn) for side, turn in turns.items()},
    }


def count_operations(step: Callable[[int], Any]) -> dict[str, Any]:
    """Count the floating-point operations and the torch operations of a step, and how often it waits for the device,
    by line."""
    with Dispatched() as counted:
        flops = counted_flops(step)
    lines = {os.path.relpath(line, ROOT): number for line, number in counted.waits.items()}
    return {"flops": flops, "operations": counted.operations, "waits": sum(lines.values()), "lines": lines}


def report(results: dict[str, Any]) -> str:
    """Format the results as text."""
    lines = [
        f"{results['date']}; {results['machine']}; {results['threads']} thread(s); load before: {results['load']:.1f}",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        f"floor: {FLOOR}",
    ]
    for name, case in results["cases"].items():
        lines += ["", *table(name, case)]
    return "\n".join(lines)


def table(name: str, case: dict[str, Any]) -> list[str]:
    """Format the results of one case."""
    head = f"{name}, {case['tokens']:.0f} tokens/step, {case['labels']:.0f} with a label"
    columns = ("operations", "waits", "GFLOP", "tokens/CPU s", "ratio")
    lines = [f"{head:<56}" + "".join(f"{column:>13}" for column in columns) + "  quartiles, fastest rounds, GFLOP"]
    own = case["operations"]["anymal"]["flops"]
    for side, rate in case["tokens_per_cpu_second"].items():
        counts = case["operations"][side]
        line = f"{side if side == 'anymal' else f'transformers, {side}':<56}"
        line += f"{counts['operations']:>13}{counts['waits']:>13}{counts['flops'] / 1e9:>13.1f}{rate:>13.0f}"
        if side in case["ratios"]:
            of = case["ratios"][side]
            line += f"{of['median']:>13.2f}  {of['lower']:.2f} to {of['upper']:.2f}, {of['fastest']:.2f}, "
            line += f"{counts['flops'] / own:.2f}"
        lines.append(line)
    largest = max(abs(loss / losses["anymal"] - 1) for losses in case["losses"] for loss in losses.values())
    gradients = max(case["gradient_differences"].values())
    differ = f"losses of {len(case['losses'])} steps differ by {largest:.1e}, gradients by {gradients:.1e}"
    return [*lines, f"{differ}; {verdict(name, case['ratios'])}"]


def verdict(name: str, ratios: Mapping[str, Mapping[str, float]]) -> str:
    """Whether the ratios to the same packs reach the bar."""
    bar = CASES[name].bar
    reached = all(of["median"] >= bar for layout, of in ratios.items() if layout.startswith("packed"))
    return f"{'reaches' if reached else 'BELOW'} the bar of {bar} with the same packs"


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file for the results, including raw numbers")
    parser.add_argument("--case", action="append", choices=list(CASES), help="case to measure (default: all of them)")
    add_arguments(parser, Repetitions, MixedSizes)
    arguments = vars(parser.parse_args(argv))
    out, cases = arguments.pop("out"), arguments.pop("case") or list(CASES)
    repetitions = Repetitions(**{field.name: arguments.pop(field.name) for field in fields(Repetitions)})
    sizes = MixedSizes(**arguments)
    if repetitions.rounds < 2:
        parser.error("--rounds must be at least 2, to compute quartiles.")
    if out and not Path(out).resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {str(Path(out).parent)!r}.")
    torch.set_num_threads(1)
    results = {"command": " ".join(["python benchmarks/step_vs_transformers.py", *argv]), **surroundings()}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        results["cases"] = {name: measure(name, sizes, repetitions) for name in cases}
    print(report(results))
    if out:
        Path(out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
