"""`anymal evaluate`: scores on public benchmarks (--task), or accuracy of exact answers on prepared samples (--data).

On prepared samples the last text, or the last turn of a conversation, is the expected answer; the model gets everything
before it. Answers are greedy by default.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.cli.code_arguments import add_code_arguments, warn_of_length, with_codes
from megatron_anymal.cli.evaluate_tasks import ListTasks, add_task_arguments, evaluate_tasks
from megatron_anymal.cli.integrity_arguments import (
    add_integrity_argument,
    integrity_of,
    load_checked_generator,
    report_overhead,
)
from megatron_anymal.cli.model_arguments import (
    add_model_arguments,
    add_sampling_arguments,
    check_model,
    discrete_of,
    sampling_of,
)
from megatron_anymal.config import ConfigError
from megatron_anymal.generation.sampling import Sampling

# Options of one of the two kinds of data only.
_OF_PREPARED = ("permute_media", "untrained", "modalities", "code_sampling")
_OF_TASKS = ("data_root", "task_folder", "likelihood", "without_metric", "against")


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    arguments = _parser().parse_args(argv)
    if bool(arguments.task) == bool(arguments.data):
        raise ConfigError("Name either benchmarks with --task or prepared folders with --data. See --list-tasks.")
    kind, others = ("task", _OF_PREPARED) if arguments.task else ("data", _OF_TASKS)
    for name in others:
        if getattr(arguments, name):
            raise ConfigError(f"--{name.replace('_', '-')} cannot be combined with --{kind}. Remove it.")
    if arguments.task:
        return evaluate_tasks(arguments)
    arguments.max_new_tokens = arguments.max_new_tokens or Sampling().max_new_tokens
    return _evaluate_prepared(arguments, sampling_of(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymal evaluate", description=__doc__)
    parser.add_argument("--list-tasks", action=ListTasks, help="list the benchmarks and exit")
    parser.add_argument("--data", action="append", help="a prepared folder; may be repeated")
    parser.add_argument("--limit", type=int, help="number of samples per folder or task; default: all")
    parser.add_argument("--permute-media", action="store_true", help="also score with media swapped between samples")
    parser.add_argument("--untrained", action="store_true", help="also score with the projectors' initial values")
    parser.add_argument(
        "--out", help="write scores and answers to this .json file; with --task: the folder of answers and reports"
    )
    add_integrity_argument(parser)
    add_task_arguments(parser)
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    add_code_arguments(parser)
    # Tasks have lengths of their own.
    parser.set_defaults(max_new_tokens=None)
    return parser


def _evaluate_prepared(arguments: argparse.Namespace, sampling: Sampling) -> int:
    from megatron_anymal.generation.evaluation import evaluate, permute_media, read_questions

    integrity = integrity_of(arguments)
    questions = [question for folder in arguments.data for question in read_questions(folder, arguments.limit)]
    check_model(arguments, untrained=arguments.untrained)
    sections = discrete_of(arguments)
    sampling = with_codes(sampling, arguments, sections)
    warn_of_length(sampling, sections)
    runs = {"trained": (load_checked_generator(arguments, integrity), questions)}
    if arguments.permute_media:
        runs["permuted"] = (runs["trained"][0], permute_media(questions))
    if arguments.untrained:
        runs["untrained"] = (load_checked_generator(arguments, integrity, untrained=True), questions)
    result: dict[str, Any] = {"scores": {}, "answers": {}}
    for name, (generator, asked) in runs.items():
        scores, rows = evaluate(generator, asked, sampling, arguments.batch_size)
        result["answers"][name] = rows
        result["scores"][name] = {
            modality: {
                "accuracy": s.accuracy,
                "chance": s.chance,
                "samples": s.samples,
                **({"grammatical": s.grammatical / s.samples} if generator.discrete else {}),
            }
            for modality, s in scores.items()
        }
        if integrity:
            rejected = Counter(rejection.code for rejection in generator.rejections.values())
            result.setdefault("rejected", {})[name] = dict(rejected.most_common())
        if generator.reports:
            for modality, s in scores.items():
                grammar = (
                    f", grammatical without enforcement: {s.grammatical / s.samples:.1%}" if generator.discrete else ""
                )
                exact = f"{s.accuracy:7.1%} of {s.samples} exact (guessing: {s.chance:.1%})"
                print(f"{name:10s} {modality:8s} {exact}{grammar}")
    for generator in dict.fromkeys(generator for generator, _ in runs.values()):
        report_overhead(generator, integrity)
    if arguments.out and runs["trained"][0].reports:
        Path(arguments.out).write_text(json.dumps(result, indent=1, ensure_ascii=False))
    return 0
