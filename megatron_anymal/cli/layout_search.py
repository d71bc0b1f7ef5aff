"""`anymal plan`: which layout, how long and how much memory, before a GPU is spent."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_anymal import lean_imports
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.planning.layouts.hardware import Hardware, known_gpus, load_hardware
from megatron_anymal.planning.layouts.job_size import SEARCHED

if TYPE_CHECKING:
    from megatron_anymal.planning.layouts.search import LayoutProblem, SearchResult

_DESCRIPTION = """Find the fastest layouts of a run that fit, from arithmetic alone: no GPU, no weights, no data.

Every layout that the configuration's checks allow is considered. Memory is counted as by --dry-run; a step's time comes
from the model of docs/guides/plan.md.

`anymal plan goodput --help` predicts what failures cost."""


def main(argv: Sequence[str]) -> int:
    """Run the search, or with --measure the measurement, and return the exit code."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.measure:
        return _measure(arguments)
    if arguments.run:
        return _compare(Path(arguments.run), arguments.gpu)
    strange = [text for text in arguments.overrides if "=" not in text and not text.startswith("~")]
    if strange:
        parser.error(f"{strange[0]!r} is neither `goodput` nor an override of the form key=value")
    for option in ("config_name", "gpus", "gpu"):
        if getattr(arguments, option) is None:
            parser.error(f"--{option.replace('_', '-')} is required")
    return _search(arguments, _checked_gpu(arguments))


def _checked_gpu(arguments: argparse.Namespace) -> Hardware:
    """Refuse what needs no import to be refused."""
    gpu = load_hardware(arguments.gpu)
    node = arguments.nodes_of or gpu.node_gpus
    if arguments.gpus < 1 or node < 1:
        raise ConfigError(f"--gpus={arguments.gpus} and --nodes-of={node} must be 1 or more.")
    if arguments.gpus > node and arguments.gpus % node:
        below = arguments.gpus // node * node
        raise ConfigError(
            f"--gpus={arguments.gpus} does not fill nodes of {node} (--nodes-of). Give {below} or {below + node} GPUs, "
            "or another size of a node."
        )
    _check_numbers(arguments)
    for key in arguments.keep:
        if key not in SEARCHED:
            raise ConfigError(f"--keep={key} is not one of the searched keys: {', '.join(SEARCHED)}.")
    for folder in arguments.data:
        if "://" not in folder and not (Path(folder) / "index" / "index.json").is_file():
            raise ConfigError(
                f"--data={folder} is not a folder with an index. Create one: anymal prepare --index-only {folder}"
            )
    return gpu


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.best < 1:
        raise ConfigError(f"--best={arguments.best} must be 1 or more.")
    if arguments.sample_tokens < 0:
        raise ConfigError(f"--sample-tokens={arguments.sample_tokens} must be 0 or more.")
    if not 0 <= arguments.label_share <= 1:
        raise ConfigError(f"--label-share={arguments.label_share} must be at least 0 and at most 1.")
    if arguments.html and not Path(arguments.html).resolve().parent.is_dir():
        raise ConfigError(f"--html={arguments.html}: there is no folder {Path(arguments.html).resolve().parent}.")
    if arguments.data and (arguments.sample_tokens or arguments.label_share):
        raise ConfigError(
            "--sample-tokens and --label-share replace an index, so they cannot be combined with --data. Remove "
            "--data, or the others."
        )


def _search(arguments: argparse.Namespace, gpu: Hardware) -> int:
    from megatron_anymal.config.compose import compose, config_folder
    from megatron_anymal.config.validation import check
    from megatron_anymal.planning.layouts.job_size import with_job_size, with_kept_layout

    folder = config_folder(arguments.config_path)
    target = Path(arguments.write) if arguments.write else None
    config = compose(arguments.config_name, folder, arguments.overrides).config
    if config.model.multiplex:
        raise ConfigError(
            "anymal plan does not support alignments that end at different steps (model.multiplex). Plan the one with "
            "the largest global batch, with the configuration that runs it alone."
        )
    job = with_job_size(config, arguments.gpus, arguments.nodes_of or gpu.node_gpus)
    check(with_kept_layout(job, arguments.keep))
    if not (config.model.modalities or config.model.plugins or config.model.language_model.checkpoint):
        lean_imports.hide_torch()
    from megatron_anymal.planning.layouts import config_file
    from megatron_anymal.planning.layouts.problem import build_problem
    from megatron_anymal.planning.layouts.report import nothing_fits, render, to_dict
    from megatron_anymal.planning.layouts.search import search

    base = compose(arguments.config_name, folder, []).config if target else config
    if target:
        config_file.check_target(target, folder)
        config_file.differences(base, job)
    problem, notes = build_problem(job, gpu, arguments.data, arguments.sample_tokens, arguments.label_share)
    layouts = problem.layouts(arguments.keep)
    if not layouts:
        kept = ", ".join(f"{key}={getattr(config.model, key)}" for key in arguments.keep) or "none"
        raise ConfigError(
            f"no layout of {arguments.gpus} GPUs passes the checks (kept: {kept}). Change --gpus, or remove a --keep."
        )
    result = search(problem, layouts, arguments.best)
    if not result.ranked:
        raise nothing_fits(problem, result)
    if arguments.json:
        print(json.dumps(to_dict(problem, result, notes), indent=2))
    else:
        print(render(problem, result, notes))
    if arguments.html:
        _write_html(Path(arguments.html), problem, result)
    if target:
        _write(target, arguments, base, config_file.planned_config(job, *_winner(result), arguments.gpu))
    return 0


def _winner(result: SearchResult) -> tuple[Any, Any]:
    best = result.ranked[0]
    return best.layout, best.choice.recompute


def _write(target: Path, arguments: argparse.Namespace, base: RunConfig, planned: RunConfig) -> None:
    from megatron_anymal.planning.layouts.config_file import differences, write_config

    name = arguments.config_name.removesuffix(".yaml")
    comment = f"Written by anymal plan: the fastest layout that fits on {arguments.gpus} x {arguments.gpu}."
    write_config(target, name, differences(base, planned), comment)


def _write_html(path: Path, problem: LayoutProblem, result: SearchResult) -> None:
    from megatron_anymal.planning.layouts.timeline_page import timeline_page

    path.write_text(timeline_page(problem, result.ranked[:2]), encoding="utf-8")


def _compare(run_dir: Path, gpu: str | None) -> int:
    from megatron_anymal.planning.layouts.comparison import compare, config_of_run

    given = load_hardware(gpu) if gpu else None
    config = config_of_run(run_dir)
    if given is None and not config.trainer.gpu:
        raise ConfigError(f"--run={run_dir}: the run names no GPU (trainer.gpu). Add --gpu.")
    print(compare(config, given or load_hardware(config.trainer.gpu, "trainer.gpu"), run_dir))
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from megatron_anymal.planning.layouts.measurement import measure_machine, write_measurement

    path = Path(arguments.measure)
    if path.suffix != ".yaml" or not path.resolve().parent.is_dir():
        raise ConfigError(f"--measure={path} must be a file that ends with .yaml, in a folder that exists.")
    write_measurement(path, measure_machine())
    print(f"wrote {path}: use it with --gpu {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anymal plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="anymal plan --config-name NAME --gpus NUMBER --gpu NAME [options] [key=value ...]\n"
        "       anymal plan --run FOLDER [--gpu NAME]\n"
        "       anymal plan --measure FILE.yaml\n"
        "       anymal plan goodput [options]",
    )
    parser.add_argument("--config-name", "-cn", help="YAML file of the configuration folder")
    parser.add_argument("--config-path", "-cp", help="configuration folder; default: the shipped nemo_configs")
    parser.add_argument("--gpus", type=int, metavar="NUMBER", help="number of GPUs of the job")
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(known_gpus())}, or a file of --measure")
    parser.add_argument(
        "--nodes-of", type=int, metavar="NUMBER", help="GPUs per node (default: the usual number for this GPU)"
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="FOLDER", help="take document lengths from this folder's index"
    )
    parser.add_argument(
        "--sample-tokens", type=int, default=0, metavar="NUMBER", help="without an index: LLM tokens of a sample"
    )
    parser.add_argument(
        "--label-share", type=float, default=0.0, metavar="SHARE", help="without an index: share of tokens with a label"
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="KEY", help="keep this key of `model` as configured, e.g. fp8"
    )
    parser.add_argument("--best", type=int, default=10, metavar="NUMBER", help="layouts to print (default: 10)")
    parser.add_argument("--write", metavar="FILE", help="write the fastest layout as a configuration")
    parser.add_argument("--html", metavar="FILE", help="write a page with the timelines of the two fastest layouts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--run", metavar="FOLDER", help="compare what this run has measured with its plan, then stop")
    parser.add_argument("--measure", metavar="FILE", help="measure this machine into a file for --gpu, then stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    return parser
