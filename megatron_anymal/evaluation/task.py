"""A benchmark as data: which columns of a public data set hold what, how to ask (AnyMAL section E.1), how to score."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from megatron_anymal.config import ConfigError
from megatron_anymal.data.anymal_prompts import BY_TASK

# Readers of evaluation/samples.py and evaluation/readers.py.
READERS = ("rows", "mmmu", "mathvista", "ego4d")
# Parsers of evaluation/answer_parsing.py.
PARSERS = ("text", "first_line", "caption_json", "letter", "yes_no")
# Metrics of evaluation/metric_registry.py.
METRICS = (
    "vqa_accuracy",
    "textvqa_accuracy",
    "anls",
    "relaxed_accuracy",
    "exact_match",
    "mathvista_accuracy",
    "choice_accuracy",
    "choice_likelihood",
    "auroc",
    "cider",
    "rouge_l",
    "spice",
    "spider",
)
# What a correct option is given as.
_ANSWER_FORMS = ("letter", "index", "text")
_SCORED_BY = ("letters", "texts")


@dataclass(frozen=True)
class MediaColumn:
    """The column that holds a sample's media: files' contents, or names of files."""

    # Its path in a row, as of `lookup` in evaluation/rows.py.
    column: str
    # Folder of the named files, relative to the data.
    folder: str = ""
    # The same by the name of the file, without extension, that the row is from.
    folders: dict[str, str] = field(default_factory=dict)
    # Added to names that lack it, with the dot.
    extension: str = ""


@dataclass(frozen=True)
class OptionColumns:
    """The options of a multiple-choice question."""

    # A column that lists them, or one column per option; columns that are empty in a row count as absent.
    columns: tuple[str, ...]
    # Column with the correct option.
    answer: str
    # How it is given: "letter", "index" (from 0) or "text" (of the option).
    answer_is: str = "letter"
    # Whether the texts of the options begin with their letters ("A. a cat").
    lettered: bool = False
    # What `choice_likelihood` scores as the answer: "letters" or "texts" of the options.
    scored_by: str = "letters"


@dataclass(frozen=True)
class PaperNumbers:
    """What the paper reports."""

    # The table or section.
    where: str
    # Metric -> model -> value, as printed.
    values: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Raises:
        ConfigError: a value is not one of the known names, or out of range.
    """

    # Name on the command line.
    name: str
    # Name in reports.
    title: str
    # Data set whose column names these are, and where they are documented.
    source: str
    # Patterns of the files to read, relative to the data; those of the first pattern that matches are used.
    files: tuple[str, ...]
    # Key of data/anymal_prompts.py.
    prompt: str
    # Columns that together identify a sample; `_row` is the number of the row.
    key: tuple[str, ...]
    # Where media are.
    media: MediaColumn
    # Metrics; the first one is the headline.
    metrics: tuple[str, ...]
    # Split of a saved DatasetDict.
    split: str = ""
    # Text of the prompt -> column.
    texts: dict[str, str] = field(default_factory=dict)
    # Column with the reference answers.
    references: str = ""
    # Options of multiple choice.
    options: OptionColumns | None = None
    # Whether rows with the same key are one sample, with the references of all.
    merge_rows: bool = False
    # How rows become samples.
    reader: str = "rows"
    # How the model's text becomes an answer.
    parse: str = "text"
    # Fixed candidates whose likelihood is computed for every sample.
    candidates: tuple[str, ...] = ()
    # Longest answer in tokens.
    max_new_tokens: int = 16
    # Column by which scores are broken down.
    breakdown: str = ""
    # Where the task departs from the paper or from the public data.
    notes: str = ""
    # What to set beside the scores.
    paper: PaperNumbers | None = None

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        for key, value, known in (
            ("prompt", self.prompt, tuple(BY_TASK)),
            ("reader", self.reader, READERS),
            ("parse", self.parse, PARSERS),
            *(("metrics", metric, METRICS) for metric in self.metrics),
        ):
            require_known(value, known, f"{where}: {key}")
        if self.options:
            require_known(self.options.answer_is, _ANSWER_FORMS, f"{where}: options.answer_is")
            require_known(self.options.scored_by, _SCORED_BY, f"{where}: options.scored_by")
        if not self.metrics or not self.files or not self.key:
            raise ConfigError(f"{where}: files, key and metrics need at least one entry each.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"{where}: max_new_tokens={self.max_new_tokens} must be at least 1.")

    @property
    def prompt_fields(self) -> set[str]:
        """Texts that the prompt takes."""
        return BY_TASK[self.prompt].fields

    def fingerprint(self) -> str:
        """Hash of everything that determines samples and answers: not of titles, notes and metrics."""
        shown = {"title", "source", "notes", "paper", "metrics", "breakdown", "parse"}
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in shown}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_task(path: Path) -> Task:
    """Read a task file.

    Raises:
        ConfigError: naming the file, the key and the fix.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{str(path)!r}: a task file is a mapping of keys to values.")
    return _build(Task, {"name": path.stem, **value}, str(path))


def require_known(value: str, known: tuple[str, ...], where: str) -> None:
    """Refuse a name that is not known.

    Raises:
        ConfigError: with the nearest known name.
    """
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        raise ConfigError(
            f"{where}: unknown name {value!r}. "
            + (f"Did you mean {near[0]!r}?" if near else f"Use {', '.join(known)}.")
        )


def _build(kind: Any, value: dict[str, Any], where: str) -> Any:
    """Build a dataclass from a mapping of a task file."""
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            require_known(key, tuple(hints), f"{where}: keys")
    built = {}
    for entry in dataclasses.fields(kind):
        if entry.name in value:
            built[entry.name] = _convert(value[entry.name], hints[entry.name], f"{where}: {entry.name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key {entry.name!r} is missing. Add it.")
    return kind(**built)


def _convert(value: Any, hint: Any, where: str) -> Any:
    nested = [kind for kind in (MediaColumn, OptionColumns, PaperNumbers) if kind in (hint, *_arguments(hint))]
    wanted: Any = dict if nested or str(hint).startswith("dict") else hint
    if str(hint).startswith("tuple"):
        value, wanted = (value if isinstance(value, list) else [value]), list
        if any(not isinstance(entry, str) for entry in value):
            raise ConfigError(f"{where} must be a text or a list of texts.")
    if not isinstance(value, wanted):
        raise ConfigError(f"{where}={value!r} must be of type {wanted.__name__}.")
    if nested:
        return _build(nested[0], value, where)
    return tuple(value) if wanted is list else value


def _arguments(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", ())
