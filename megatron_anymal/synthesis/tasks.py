"""Kinds of conversations to ask for: prompts in YAML files, with a Jinja template for the description of the media."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from megatron_anymal.data.records import DataError
from megatron_anymal.synthesis.sources import SourceSample

_FIELDS = {"about", "system", "user", "min_pairs", "max_pairs"}


@dataclass(frozen=True)
class ConversationTask:
    """A kind of conversation."""

    # Its name.
    name: str
    # One line for people.
    about: str
    # System message.
    system: str
    # Jinja template of the user message, with captions, objects and boxes.
    user: str
    # Minimum number of question-answer pairs in a conversation.
    min_pairs: int
    # Maximum number of question-answer pairs in a conversation.
    max_pairs: int

    @property
    def fingerprint(self) -> str:
        """Hash of everything that shapes the requests."""
        return hashlib.sha256(repr((self.system, self.user, self.min_pairs, self.max_pairs)).encode()).hexdigest()

    def messages(self, source: SourceSample) -> list[dict[str, str]]:
        """The messages of a request.

        Raises:
            DataError: the template names something that does not exist.
        """
        import jinja2
        from jinja2.sandbox import SandboxedEnvironment

        environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            template = environment.from_string(self.user)
            text = template.render(captions=source.captions, objects=source.objects, boxes=source.boxes)
        except jinja2.TemplateError as error:
            raise DataError(f"The template of the task {self.name!r} cannot be filled: {error}.") from None
        return [{"role": "system", "content": self.system.strip()}, {"role": "user", "content": text.strip()}]


def shipped_tasks() -> dict[str, ConversationTask]:
    """The tasks of this package by name."""
    folder = files("megatron_anymal.synthesis").joinpath("tasks")
    paths = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name[:-5]: _parse(folder.joinpath(name).read_text("utf-8"), name[:-5], name) for name in paths}


def find_task(kind: str) -> ConversationTask:
    """A shipped task by its name, or one from a .yaml file.

    Raises:
        DataError: there is none, or the file has other fields.
    """
    if kind.endswith(".yaml"):
        path = Path(kind)
        if not path.is_file():
            raise DataError(f"--task {kind!r}: there is no such file.")
        return _parse(path.read_text("utf-8"), path.stem, kind)
    tasks = shipped_tasks()
    if kind not in tasks:
        raise DataError(f"--task {kind!r} is not known. Name one of {', '.join(tasks)}, or a .yaml file.")
    return tasks[kind]


def _parse(text: str, name: str, where: str) -> ConversationTask:
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{where}: not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise DataError(f"{where}: a task has exactly the fields {', '.join(sorted(_FIELDS))}.")
    if not all(isinstance(value[key], str) for key in ("about", "system", "user")):
        raise DataError(f"{where}: about, system and user must be texts.")
    least, most = value["min_pairs"], value["max_pairs"]
    if type(least) is not int or type(most) is not int or not 1 <= least <= most:
        raise DataError(f"{where}: min_pairs and max_pairs must be whole numbers, 1 <= min_pairs <= max_pairs.")
    return ConversationTask(name, **value)
