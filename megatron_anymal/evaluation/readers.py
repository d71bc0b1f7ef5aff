"""Readers of data sets whose format needs code: MMMU, MathVista and Ego4D; all others are read by their task file."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_anymal.data.records import DataError
from megatron_anymal.evaluation.ego4d import read_ego4d
from megatron_anymal.evaluation.rows import Rows, open_rows
from megatron_anymal.evaluation.samples import (
    LETTERS,
    TaskSample,
    listed,
    read_samples,
    references_of,
    stored_item,
    text_of,
)
from megatron_anymal.evaluation.task import Task

_IMAGE = re.compile(r"<image (\d+)>")


def samples_of(task: Task, folder: Path) -> tuple[list[TaskSample], str]:
    """Read the samples of a task, and a fingerprint of the data.

    Raises:
        DataError: naming what cannot be used.
    """
    if task.reader == "ego4d":
        return read_ego4d(task, folder)
    rows = open_rows(folder, task.files, task.split)
    read: Callable[..., list[TaskSample]] = {"rows": read_samples, "mmmu": _mmmu, "mathvista": _mathvista}[task.reader]
    samples = read(task, rows, folder)
    if not samples:
        raise DataError(f"{rows.where} has no rows.")
    return samples, rows.fingerprint()


def _mmmu(task: Task, rows: Rows, folder: Path) -> list[TaskSample]:
    """MMMU: options are a Python list as text, and `<image N>` in the texts refers to the column image_N. The images
    are given in order in front of the question; open questions take the prompt of VQA."""
    columns = rows.require(["id", "question", "options", "answer", "question_type"])
    rows.require(["image_1"])
    samples = []
    for number, row in enumerate(rows.read(columns)):
        where = f"{rows.where}, row {number}"
        options = [str(option) for option in _literal(row["options"], where)]
        shown = _IMAGE.findall(row["question"] + " ".join(options))
        names = [f"image_{one}" for one in sorted(set(map(int, shown)))] or ["image_1"]
        media = tuple(stored_item(rows, number, name, where) for name in rows.require(names))
        is_open = row["question_type"] != "multiple-choice"
        answer = text_of(row["answer"])
        if not is_open and answer not in LETTERS[: len(options)]:
            raise DataError(f"{where}: answer={answer!r} is not one of the options. Use the split validation.")
        references = references_of(_literal(answer, where) if answer.startswith("[") else answer, where)
        sample = _choice_or_open(
            task, number, row["id"], row["question"], media, [] if is_open else options, references
        )
        samples.append(sample)
    return samples


def _mathvista(task: Task, rows: Rows, folder: Path) -> list[TaskSample]:
    """MathVista: the image is in decoded_image (`image` is its former file name); questions without choices take the
    prompt of VQA, and their answers are compared as numbers of a stated precision."""
    columns = rows.require(["pid", "question", "choices", "answer", "answer_type", "precision", "unit"])
    rows.require(["decoded_image"])
    samples = []
    for number, row in enumerate(rows.read(columns)):
        where = f"{rows.where}, row {number}"
        options = [str(option) for option in row["choices"] or []]
        references = references_of(row["answer"], where)
        if options and references[0] not in options:
            raise DataError(f"{where}: answer={references[0]!r} is not one of the choices. Use the split testmini.")
        letter = (LETTERS[options.index(references[0])],) if options else references
        question = row["question"] + (f" (Unit: {row['unit']})" if row["unit"] else "")
        media = (stored_item(rows, number, "decoded_image", where),)
        details = {name: row[name] for name in ("answer_type", "precision")}
        samples.append(_choice_or_open(task, number, row["pid"], question, media, options, letter, details))
    return samples


def _choice_or_open(
    task: Task,
    number: int,
    key: Any,
    question: str,
    media: tuple[Any, ...],
    options: list[str],
    references: tuple[str, ...],
    details: Mapping[str, Any] | None = None,
) -> TaskSample:
    if not options:
        return TaskSample(number, str(key), "vqa", {"question": question}, media, references, details=details or {})
    texts = {"context": "", "question": question, "choices": listed(options)}
    correct, letters = LETTERS.index(references[0]), tuple(LETTERS[: len(options)])
    return TaskSample(
        number, str(key), task.prompt, texts, media, references, tuple(options), correct, letters, details=details or {}
    )


def _literal(text: str, where: str) -> list[Any]:
    try:
        return list(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError):
        raise DataError(f"{where}: {text[:60]!r} is not a list of Python texts.") from None
