"""Samples of a task: rows of the data set as prompts, references and options."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_anymal.data.anymal_prompts import messages_from_prompt
from megatron_anymal.data.prompt_encoder import open_parts
from megatron_anymal.data.records import DataError
from megatron_anymal.evaluation.media_cells import MediaItem, file_in_cell, named_file
from megatron_anymal.evaluation.rows import Rows, lookup
from megatron_anymal.evaluation.task import MediaColumn, OptionColumns, Task
from megatron_anymal.generation.prompts import Prompt

LETTERS = string.ascii_uppercase
# Name, in a task's key, of the row's number.
ROW = "_row"
# Values that stand for an empty cell: MMBench writes the text "nan".
_EMPTY = ("", "nan", "None")


@dataclass(frozen=True)
class TaskSample:
    """A sample to answer and to score."""

    # Position in the data set, which names its random draws.
    number: int
    # Identifies it in the data set.
    key: str
    # Key of data/anymal_prompts.py.
    prompt: str
    # The prompt's texts.
    texts: Mapping[str, str]
    # Media in the order of the prompt.
    media: tuple[MediaItem, ...]
    # Correct answers, in the form that the metrics compare.
    references: tuple[str, ...]
    # Texts of the options; empty if the question is open.
    options: tuple[str, ...] = ()
    # Number of the correct option; -1 if there is none.
    correct: int = -1
    # Texts whose likelihood as the answer may be scored.
    candidates: tuple[str, ...] = ()
    # Value of the task's `breakdown` column.
    group: str = ""
    # Further columns that a metric needs.
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Estimate of the prompt's length, for batches of similar lengths."""
        return sum(map(len, self.texts.values())) + 1000 * len(self.media)


def build_prompt(sample: TaskSample) -> Prompt:
    """Lay out the prompt of section E.1 and read the media.

    Raises:
        DataError: a media file cannot be read.
    """
    parts = [{"media": item.name, **item.attributes} for item in sample.media]
    messages = messages_from_prompt(sample.prompt, parts, **sample.texts)
    return Prompt(open_parts({"messages": messages}, sample.key), [item.read() for item in sample.media])


def listed(options: Sequence[str]) -> str:
    """Options as the prompt lists them: (A) a cat (B) a dog."""
    return " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))


def read_samples(task: Task, rows: Rows, folder: Path) -> list[TaskSample]:
    """Samples of a task whose rows need no code of their own.

    Raises:
        DataError: naming the data, the row and the column that cannot be used.
    """
    options = task.options
    columns = rows.require([*_without_row(task.key), *task.texts.values(), task.references, task.breakdown])
    if options:
        columns = list(dict.fromkeys([*columns, *rows.require([options.answer]), *_present(options.columns, rows)]))
    build = partial(_sample, task, rows, media_reader(task.media, rows, folder))
    return _by_key((build(number, row) for number, row in enumerate(rows.read(columns))), rows, task.merge_rows)


def _sample(
    task: Task, rows: Rows, media: Callable[[int, str], MediaItem], number: int, row: Mapping[str, Any]
) -> TaskSample:
    where = f"{rows.where}, row {number}"
    names = [number if column == ROW else lookup(row, column) for column in task.key]
    if None in names:
        raise DataError(f"{where}: the key {', '.join(task.key)} is empty.")
    key = "/".join(map(str, names))
    options = options_of(task.options, row, where) if task.options else ()
    correct = correct_option(task.options, options, row, where) if task.options else -1
    references = (LETTERS[correct],) if task.options else references_of(lookup(row, task.references), where)
    texts = {name: text_of(lookup(row, column)) for name, column in task.texts.items()}
    fields = {"context": "", "choices": listed(options), "options": listed(options), **texts}
    return TaskSample(
        number,
        f"{rows.file_of(number)}/{key}" if task.media.folders else key,
        task.prompt,
        {name: fields.get(name, "") for name in task.prompt_fields},
        (media(number, where),),
        references,
        options,
        correct,
        task.candidates or candidates_of(task.options, options),
        text_of(lookup(row, task.breakdown)) if task.breakdown else rows.file_of(number) * bool(task.media.folders),
    )


def _by_key(samples: Iterable[TaskSample], rows: Rows, merge: bool) -> list[TaskSample]:
    """Refuse samples with the same key, or join them: the first one, with the references of all."""
    by_key: dict[str, TaskSample] = {}
    for sample in samples:
        first = by_key.setdefault(sample.key, sample)
        if first is not sample and not merge:
            raise DataError(
                f"{rows.where}, rows {first.number} and {sample.number}: both have the key {sample.key!r}. Name "
                f"columns that tell them apart in the task file's `key`, or `{ROW}`."
            )
        if first is not sample:
            by_key[sample.key] = replace(first, references=first.references + sample.references)
    return list(by_key.values())


def text_of(value: Any) -> str:
    """A cell as text; empty cells are empty texts."""
    return "" if value is None or str(value) in _EMPTY else str(value)


def references_of(value: Any, where: str) -> tuple[str, ...]:
    """Reference answers of a cell: one or a list.

    Raises:
        DataError: there are none.
    """
    answers = tuple(str(answer) for answer in (value if isinstance(value, (list, tuple)) else [value]))
    if value is None or not answers or "None" in answers:
        raise DataError(f"{where}: there is no reference answer. Use a split whose answers are public.")
    return answers


def options_of(columns: OptionColumns, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Texts of the options, without their letters.

    Raises:
        DataError: there are fewer than two.
    """
    values = [row.get(column) for column in columns.columns]
    cells = values[0] if len(values) == 1 and isinstance(values[0], (list, tuple)) else values
    texts = [text_of(cell) for cell in cells]
    options = [text for text in texts if text]
    if columns.lettered:
        options = [_without_letter(text, letter) for letter, text in zip(LETTERS, options)]
    if len(options) < 2:
        raise DataError(f"{where}: the columns {', '.join(columns.columns)} hold fewer than two options.")
    return tuple(options)


def correct_option(columns: OptionColumns, options: Sequence[str], row: Mapping[str, Any], where: str) -> int:
    """Number of the correct option.

    Raises:
        DataError: the answer is not one of them.
    """
    answer = text_of(lookup(row, columns.answer)).strip()
    names = {
        "letter": list(LETTERS[: len(options)]),
        "index": [str(number) for number in range(len(options))],
        "text": [option.strip() for option in options],
    }[columns.answer_is]
    if answer not in names:
        raise DataError(
            f"{where}: {columns.answer}={answer!r} is not one of the {len(options)} options as {columns.answer_is}. "
            "Use a split whose answers are public, or correct `answer_is` in the task file."
        )
    return names.index(answer)


def candidates_of(columns: OptionColumns | None, options: Sequence[str]) -> tuple[str, ...]:
    """The texts whose likelihood is scored: letters or texts of the options."""
    if columns is None:
        return ()
    return tuple(LETTERS[: len(options)]) if columns.scored_by == "letters" else tuple(options)


def media_reader(media: MediaColumn, rows: Rows, folder: Path) -> Callable[[int, str], MediaItem]:
    """A function from a row's number and name to its media item. Names are read at once, contents when needed.

    Raises:
        DataError: the column is missing.
    """
    rows.require([media.column])
    if len(rows) and not isinstance(rows.cell(0, media.column), str):
        return lambda number, where: stored_item(rows, number, media.column, where)
    columns = rows.require([media.column, *_fields(media.folder)])
    cells = list(rows.read(columns))

    def item(number: int, where: str) -> MediaItem:
        row, name = cells[number], str(cells[number][media.column])
        parent = media.folders.get(rows.file_of(number)) or media.folder.format_map(row)
        if media.folders and not parent:
            raise DataError(f"{where}: media.folders has no folder for files of {rows.file_of(number)!r}.")
        name += media.extension if not name.lower().endswith(media.extension) else ""
        return named_file(folder / parent / name, where)

    return item


def stored_item(rows: Rows, number: int, column: str, where: str) -> MediaItem:
    """The media item whose content is stored in a cell."""
    name = f"{where}, column {column}"
    return MediaItem(name, lambda: file_in_cell(rows.cell(number, column), name))


def _without_row(columns: Sequence[str]) -> list[str]:
    return [column for column in columns if column != ROW]


def _fields(template: str) -> Iterator[str]:
    return (name for _, name, _, _ in string.Formatter().parse(template) if name)


def _present(columns: Sequence[str], rows: Rows) -> list[str]:
    """Columns of options; of several, the later ones may be missing."""
    return rows.require(columns[:2]) + [column for column in columns[2:] if column in rows.columns]


def _without_letter(text: str, letter: str) -> str:
    for start in (f"{letter}.", f"({letter})", f"{letter})", f"{letter}:"):
        if text.startswith(start):
            return text.removeprefix(start).strip()
    return text
