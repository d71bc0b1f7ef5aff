"""`anymal plan`: predict what a run will do, from arithmetic alone; needs no GPU and starts nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_anymal.config import ConfigError
from megatron_anymal.planning.goodput_inputs import GPUS, INPUTS, Input, resolve
from megatron_anymal.planning.goodput_report import evaluate, render, to_dict
from megatron_anymal.planning.measured_run import MeasuredRun, measure

_GOODPUT = """Share of the time that goes into steps that are kept, with failures, and the save interval to choose.

Times between failures are exponentially distributed. A failure can also hit a recovery, and one that hits while a save
is being written loses that save. The ratio is exact under these assumptions: docs/operations/goodput.md derives it and
names the sources of the defaults."""


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code: the layout search, or `goodput`."""
    if argv and argv[0] == "goodput":
        return _goodput(_goodput_parser().parse_args(argv[1:]))
    # Imports yaml.
    from megatron_anymal.cli import layout_search

    return layout_search.main(argv)


def _goodput_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anymal plan goodput",
        description=_GOODPUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="anymal plan goodput [options]",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        action="append",
        metavar="NUMBER",
        help=f"number of GPUs; may be repeated (default: those of --run, or {', '.join(map(str, GPUS))})",
    )
    parser.add_argument("--run", metavar="FOLDER", help="read the inputs that are not given from this run's folder")
    for item in INPUTS:
        parser.add_argument(item.option, type=int if item.whole else float, metavar=item.unit, help=_help(item))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _help(item: Input) -> str:
    default = f"{item.default:.6g}, {item.source}" if item.default is not None else item.source
    return f"{item.help} (default: {default})".replace("%", "%%") if default else item.help


def _goodput(arguments: argparse.Namespace) -> int:
    """Print the expected goodput for each number of GPUs."""
    if arguments.mtbf_per_gpu_hours is not None and arguments.mtbf_per_node_hours is not None:
        raise ConfigError("--mtbf-per-gpu-hours and --mtbf-per-node-hours are mutually exclusive. Give one.")
    run = measure(Path(arguments.run)) if arguments.run else MeasuredRun()
    gpus = arguments.gpus or ([run.processes] if run.processes else list(GPUS))
    for number in gpus:
        if number < 1:
            raise ConfigError(f"--gpus={number} must be 1 or more.")
    values = resolve({item.name: getattr(arguments, item.name) for item in INPUTS}, run.values)
    results = [evaluate(values, number) for number in sorted(set(gpus))]
    if arguments.json:
        print(json.dumps(to_dict(values, results, run.notes), indent=2))
    else:
        print(render(values, results, run.notes))
    return 0
