"""Results of an evaluation: scores with their standard errors, and every answer with its values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_anymal.data.records import DataError
from megatron_anymal.evaluation.answer_parsing import parse_answer
from megatron_anymal.evaluation.journal import AnswerRow
from megatron_anymal.evaluation.metric_registry import METRICS, Answered
from megatron_anymal.evaluation.samples import TaskSample
from megatron_anymal.evaluation.task import Task

FORMAT = "anymal-evaluation-1"


def task_result(
    task: Task, samples: Sequence[TaskSample], answers: Mapping[str, AnswerRow], metrics: Sequence[str]
) -> dict[str, Any]:
    """Score a task.

    Args:
        answers: by key, of all samples.
        metrics: those of the task that are wanted and can be computed.
    """
    rows = [_answered(task, sample, answers[sample.key]) for sample in samples]
    values = {name: METRICS[name].values(rows) for name in metrics}
    labels = [int(sample.references[0] == "1") for sample in samples]
    groups: dict[str, list[int]] = {}
    for position, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(position)
    return {
        "title": task.title,
        "source": task.source,
        "notes": task.notes,
        "samples": len(rows),
        "unparsed": sum(not row.answer for row in rows),
        "scores": {name: _score(name, values[name], labels) for name in metrics},
        "breakdown": {
            group: {"samples": len(positions), **{name: _of(name, positions, values[name], labels) for name in metrics}}
            for group, positions in sorted(groups.items())
            if len(groups) > 1
        },
        "paper": asdict(task.paper) if task.paper else None,
        "answers": [_row(row, label, position, values) for position, (row, label) in enumerate(zip(rows, labels))],
    }


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json, or that of a folder.

    Raises:
        DataError: it is missing or not a result of this program.
    """
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"There are no results {str(file)!r}. Name a results.json that `anymal evaluate --task` wrote.")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{str(file)!r} is damaged ({error}). Evaluate again.") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DataError(f"{str(file)!r} is not a results.json of `anymal evaluate --task`.")
    return value


def _answered(task: Task, sample: TaskSample, row: AnswerRow) -> Answered:
    # A refusal holds no answer, whatever a parser would find in its text.
    answer = "" if row.rejected else parse_answer(task, sample, row.text)
    return Answered(sample, row.text, answer, row.log_likelihoods)


def _score(name: str, values: Sequence[float], labels: Sequence[int]) -> dict[str, Any]:
    """A metric's score; the standard error of the mean, None for metrics that rank."""
    metric = METRICS[name]
    error = None if metric.ranks or len(values) < 2 else 100 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return {"title": metric.title, "value": metric.score(values, labels), "standard_error": error}


def _of(name: str, positions: Sequence[int], values: Sequence[float], labels: Sequence[int]) -> float:
    return METRICS[name].score(
        [values[position] for position in positions], [labels[position] for position in positions]
    )


def _row(row: Answered, label: int, position: int, values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    sample = row.sample
    return {
        "key": sample.key,
        "question": sample.texts.get("question", ""),
        "options": list(sample.options),
        "references": list(sample.references),
        "text": row.text,
        "answer": row.answer,
        "log_likelihoods": list(row.log_likelihoods),
        "label": label,
        "values": {name: values[name][position] for name in values},
    }
