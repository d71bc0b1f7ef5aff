"""`anymal evaluate --task`: a model on public benchmarks."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from megatron_anymal.cli.integrity_arguments import integrity_of, load_checked_generator, report_overhead
from megatron_anymal.cli.model_arguments import model_fingerprint, sampling_of
from megatron_anymal.config import ConfigError
from megatron_anymal.data.records import DataError
from megatron_anymal.evaluation.task import METRICS, Task, require_known
from megatron_anymal.evaluation.task_files import find_task, task_paths
from megatron_anymal.generation.sampling import Sampling

_CAPTION_METRICS = ("cider", "rouge_l", "spice", "spider")


class ListTasks(argparse.Action):
    """An option that prints the tasks and exits."""

    def __init__(self, **kwargs: Any):
        super().__init__(nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        """Print each task's name, title and data."""
        for name in sorted(task_paths()):
            task = find_task(name)
            print(f"{name:16s} {task.title}: {', '.join(task.metrics)}\n{'':16s} {task.source}")
        parser.exit()


@dataclass(frozen=True)
class _Job:
    """A task with its data and what to compute."""

    task: Task
    folder: Path
    metrics: tuple[str, ...]
    sampling: Sampling
    likelihood: bool


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of evaluation on benchmarks."""
    group = parser.add_argument_group("benchmarks")
    group.add_argument("--task", nargs="+", metavar="NAME[=FOLDER]", help="benchmarks, and the folders of their data")
    group.add_argument("--data-root", help="folder with a folder NAME for each task that does not name its own")
    group.add_argument("--task-folder", action="append", help="a folder of your own task files; may be repeated")
    group.add_argument("--likelihood", action="store_true", help="also score the likelihood of options")
    group.add_argument("--without-metric", nargs="+", metavar="METRIC", default=[], help="metrics to leave out")
    group.add_argument("--against", help="another results.json, to compare with on the same samples")


def evaluate_tasks(arguments: argparse.Namespace) -> int:
    """Answer, score and report; return the exit code.

    Raises:
        ConfigError, DataError, CheckpointError: an argument, the data or the checkpoint cannot be used.
    """
    if not arguments.out:
        raise ConfigError("--task needs --out FOLDER, where answers are kept and reports are written.")
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size={arguments.batch_size} must be at least 1.")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit={arguments.limit} must be at least 1.")
    jobs = [_job(text, arguments) for text in arguments.task]
    _check_metrics(jobs)
    integrity = integrity_of(arguments)
    settings = {"model": model_fingerprint(arguments)}
    settings |= {"integrity": integrity.fingerprint()} if integrity else {}
    from megatron_anymal.evaluation.metrics.captions import has_java
    from megatron_anymal.evaluation.results import FORMAT, read_results

    other = read_results(Path(arguments.against)) if arguments.against else None
    results: dict[str, Any] = {
        "format": FORMAT,
        "checkpoint": arguments.checkpoint,
        "caption_tokens": "java" if has_java() else "python",
        "tasks": {},
    }
    examples = {}
    load = cache(lambda: load_checked_generator(arguments, integrity, replicated=True))
    read = [(job, _samples(job, arguments.limit)) for job in jobs]
    _try_metrics(jobs)
    for job, (samples, data) in read:
        answers = _answers(job, samples, {**settings, "data": data}, arguments, load)
        if int(os.environ.get("RANK", "0")) == 0:
            from megatron_anymal.evaluation.results import task_result

            results["tasks"][job.task.name] = task_result(job.task, samples, answers, job.metrics)
            if integrity:
                codes = Counter(answers[sample.key].rejected for sample in samples if answers[sample.key].rejected)
                results["tasks"][job.task.name]["rejected"] = dict(codes.most_common())
            examples[job.task.name] = samples
    if load.cache_info().currsize:
        report_overhead(load(), integrity)
    if results["tasks"]:
        _report(Path(arguments.out), results, other, arguments.against or "", examples)
    return 0


def _job(text: str, arguments: argparse.Namespace) -> _Job:
    name, equals, folder = text.partition("=")
    task = find_task(name, arguments.task_folder or ())
    if not equals and not arguments.data_root:
        raise ConfigError(f"--task {name}: no data folder given. Use --task {name}=FOLDER, or --data-root.")
    for metric in arguments.without_metric:
        require_known(metric, METRICS, "--without-metric")
    likelihood = bool(task.candidates) or (arguments.likelihood and "choice_likelihood" in task.metrics)
    metrics = tuple(
        metric
        for metric in task.metrics
        if metric not in arguments.without_metric and (likelihood or metric not in ("choice_likelihood", "auroc"))
    )
    if not metrics:
        raise ConfigError(f"--without-metric leaves no metric of {name!r}, which has {', '.join(task.metrics)}.")
    chosen = argparse.Namespace(**vars(arguments))
    chosen.max_new_tokens = arguments.max_new_tokens or task.max_new_tokens
    path = Path(folder) if equals else Path(arguments.data_root) / name
    return _Job(task, path, metrics, sampling_of(chosen), likelihood)


def _check_metrics(jobs: Sequence[_Job]) -> None:
    from megatron_anymal.evaluation.metrics import captions

    if wanted := _caption_metrics(jobs):
        captions.require(wanted)


def _try_metrics(jobs: Sequence[_Job]) -> None:
    """Try what takes seconds, before anything is answered."""
    from megatron_anymal.evaluation.metrics import captions

    # Rank 0 computes them, and several of pycocoevalcap's downloads would be in each other's way.
    if int(os.environ.get("RANK", "0")) == 0:
        captions.try_spice(_caption_metrics(jobs))


def _caption_metrics(jobs: Sequence[_Job]) -> list[str]:
    wanted = [metric for job in jobs for metric in job.metrics if metric in _CAPTION_METRICS]
    return list(dict.fromkeys(wanted))


def _samples(job: _Job, limit: int | None) -> tuple[list[Any], str]:
    from megatron_anymal.evaluation.readers import samples_of

    samples, fingerprint = samples_of(job.task, job.folder)
    chosen = samples[:limit]
    if "auroc" in job.metrics and len({sample.references[0] for sample in chosen}) < 2:
        raise DataError(
            f"--task {job.task.name}: the samples have one label only, but AUROC ranks two. Raise --limit, or leave it "
            "out with --without-metric auroc."
        )
    return chosen, fingerprint


def _answers(
    job: _Job, samples: Sequence[Any], settings: dict[str, str], arguments: argparse.Namespace, load: Any
) -> dict[str, Any]:
    from megatron_anymal.evaluation.answering import Asking, answer_samples
    from megatron_anymal.evaluation.journal import AnswerJournal

    journal = AnswerJournal(Path(arguments.out) / job.task.name)
    settings = {
        **settings,
        "task": job.task.fingerprint(),
        "sampling": str(replace(job.sampling)),
        "likelihood": str(job.likelihood),
    }
    journal.check_settings(settings, write=int(os.environ.get("RANK", "0")) == 0)
    asking = Asking(job.task.name, job.sampling, arguments.batch_size, job.likelihood)
    return answer_samples(load, samples, asking, journal)


def _report(folder: Path, results: dict[str, Any], other: Any, against: str, samples: dict[str, Any]) -> None:
    """Write results.json, results.md and results.html, and print the table."""
    from megatron_anymal.cli.evaluation_page import write_page
    from megatron_anymal.evaluation.comparison import compare
    from megatron_anymal.evaluation.report import difference_rows, markdown, score_rows

    differences = compare(results, other) if other else []
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "results.md").write_text(markdown(results, differences, against), encoding="utf-8")
    write_page(folder / "results.html", results, samples, differences, against)
    _print_table(*score_rows(results))
    if differences:
        print()
        _print_table(*difference_rows(differences, results))
    print(f"\nwrote {folder}/results.json, results.md and results.html")


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
