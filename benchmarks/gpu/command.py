"""Command line of the model benchmarks: arguments and their checks, the loop over cases, JSON output."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch

# Modules shared with the CPU benchmarks are one folder up.
sys.path.append(str(Path(__file__).parents[1]))

from shapes import ENCODER, PRECISIONS, Case

from megatron_anymal.log_filters import quiet_libraries

FORMULA = """\
FLOPs of a step, two per multiply-add, for real tokens (no padding):
  4 x parameters of the frozen Llama's layers x tokens      (forward; gradient of the input)
  4 x hidden size x vocabulary x targets                    (output layer, labelled positions)
  6 x parameters of the adapters x tokens                   (SFT and DPO: including their own gradient)
  2 x all of the above parameters x tokens                  (DPO: forward pass of the reference)
  3 x 2 x heads x head size x layers x sum of L^2           (causal attention within documents of L tokens)
  2 x the encoder's parameters x its tokens + attention     (forward only)
  6 x the projector's parameters x its tokens + attention   (2 x in DPO, which freezes it)
A trained Llama would count 6 instead of 4. Recomputed activations do not count, nor do gradients that no trained weight
needs. A run's log uses the same count: docs/operations/utilization.md.
MFU = FLOPs / seconds / rate of a large matrix product measured in the same run."""

# Dimensions of a case and their choices.
CHOICES: dict[str, list[Any]] = {
    "encoder": list(ENCODER),
    "resampler_layers": [6, 12],
    "seq_length": [2048, 4096, 8192],
    "precision": list(PRECISIONS),
}

# Smallest valid values; quartiles need two rounds.
LEAST = {"packs": 1, "batches": 1, "rounds": 2, "workers": 0}

NO_CARD = (
    "{name} needs a CUDA device, and torch finds none. Add --dry-run to run it on the CPU with tiny sizes; its numbers "
    "are then meaningless."
)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark command."""

    # File name without the extension.
    name: str
    job: str
    # A key of shapes.LLAMA.
    llama: str
    # Default cases: all combinations of these values; arguments of the same names override them.
    encoder: tuple[str, ...]
    resampler_layers: tuple[int, ...]
    seq_length: tuple[int, ...]
    precision: tuple[str, ...]
    packs: int
    # Values of runs.RECOMPUTE to try, in this order; each one that does not fit costs a build of the model.
    recompute: tuple[str, ...] = ("none", "mlp", "full")
    sides: tuple[str, ...] = ("ours", "bare", "media", "huggingface")
    # Side -> why it is not in `sides`.
    left_out: tuple[tuple[str, str], ...] = ()


def base_parser(document: Optional[str]) -> argparse.ArgumentParser:
    """Arguments common to all GPU benchmarks."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.json", help="JSON file for the results, including raw numbers")
    parser.add_argument("--dry-run", action="store_true", help="run the same code with tiny sizes on the CPU")
    return parser


def parse(parser: argparse.ArgumentParser, name: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; exit if they are invalid or this machine is unsuitable."""
    arguments = parser.parse_args(argv)
    if arguments.out and not Path(arguments.out).resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {str(Path(arguments.out).parent)!r}.")
    if not arguments.dry_run and not torch.cuda.is_available():
        print(NO_CARD.format(name=name), file=sys.stderr)
        raise SystemExit(2)
    if arguments.dry_run and torch.cuda.is_available():
        parser.error("--dry-run is for machines without a GPU. Hide the GPU: CUDA_VISIBLE_DEVICES= python ...")
    quiet_libraries()
    return arguments


def _parser(benchmark: Benchmark, document: Optional[str]) -> argparse.ArgumentParser:
    parser = base_parser(f"{document}\n{FORMULA}")
    b = benchmark
    for name, choices in CHOICES.items():
        values = getattr(b, name)
        default = f"values to measure, every combination as a case; default: {' '.join(map(str, values))}"
        parser.add_argument(
            f"--{name.replace('_', '-')}", nargs="+", type=type(values[0]), choices=choices, help=default
        )
    parser.add_argument(
        "--sides", nargs="+", choices=b.sides, default=b.sides, help="sides to measure in turn; default: all"
    )
    for name, what, default, dry in _numbers(b):
        parser.add_argument(f"--{name}", type=int, help=f"{what}; default: {default}, in a dry run {dry}")
    parser.add_argument(
        "--recompute",
        nargs="+",
        choices=["none", "mlp", "full"],
        default=b.recompute,
        help=f"activation recomputation, the first that fits; default: {' '.join(b.recompute)}",
    )
    parser.add_argument("--apart", action="store_true", help="measure each side alone instead of in turn")
    parser.add_argument("--profile", action="store_true", help="profile every case, not only those that miss a bar")
    return parser


def _numbers(benchmark: Benchmark) -> list[tuple[str, str, int, int]]:
    """Numeric arguments: name, description, default, default in a dry run."""
    return [
        ("packs", "approximate packs per step", benchmark.packs, 2),
        ("batches", "number of different batches, used in turn", 4, 2),
        ("rounds", "timed rounds of all sides", 12, 2),
        ("workers", "loader processes", 8, 1),
    ]


def _arguments(benchmark: Benchmark, document: Optional[str], argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser(benchmark, document)
    arguments = parse(parser, f"{benchmark.name}.py", argv)
    dry = arguments.dry_run
    for name in CHOICES:
        values = getattr(benchmark, name)
        if dry:
            values = ("32", *values) if name == "precision" else values[:1]
        setattr(arguments, name, getattr(arguments, name) or values)
    for name, _, default, small in _numbers(benchmark):
        if getattr(arguments, name) is None:
            setattr(arguments, name, small if dry else default)
        least = LEAST[name]
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}.")
    return arguments


def run(benchmark: Benchmark, document: Optional[str], argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code (1 if a side failed, nothing was measured, or losses differ)."""
    arguments = _arguments(benchmark, document, argv)
    # Slow imports come after the argument checks.
    from cases import measure_case, prepare
    from report import card, heading, table

    command = " ".join(["python", f"benchmarks/gpu/{benchmark.name}.py", *argv])
    results: dict[str, Any] = {"command": command, **card(), "dry_run": arguments.dry_run, "formula": FORMULA}
    cases = list(_cases(benchmark, arguments))
    out = Path(arguments.out) if arguments.out else None
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder), cases[0])
        results["limits"], results["cases"] = data.limits, []
        print(heading(results), flush=True)
        for case in cases:
            measured = measure_case(case, arguments, data, dict(benchmark.left_out))
            result = {**asdict(case), "name": case.name, **measured}
            results["cases"].append(result)
            print(table(result), flush=True)
            _save(results, result, out)
    return _exit_code(results["cases"])


def _cases(benchmark: Benchmark, arguments: argparse.Namespace) -> Iterator[Case]:
    for values in itertools.product(*(getattr(arguments, name) for name in CHOICES)):
        yield Case(
            job=benchmark.job,
            llama=benchmark.llama,
            packs=arguments.packs,
            workers=arguments.workers,
            dry_run=arguments.dry_run,
            **dict(zip(CHOICES, values)),
        )


def _save(results: dict[str, Any], result: dict[str, Any], out: Optional[Path]) -> None:
    """Save after every case, so that an interrupted run keeps its results; profiles get separate files."""
    if out is None:
        return
    out.write_text(json.dumps(results, indent=1) + "\n")
    if result.get("profile"):
        profile_file = out.with_name(f"{out.stem}.{result['name']}.profile.json")
        profile_file.write_text(json.dumps(result["profile"], indent=1) + "\n")


def _exit_code(cases: Sequence[dict[str, Any]]) -> int:
    measured = [case for case in cases if "left_out" not in case]
    unequal = [case for case in measured if case["equality"] and not case["equality"]["equal"]]
    failed = [case for case in cases if case.get("failed")]
    return 1 if unequal or failed or not measured else 0
