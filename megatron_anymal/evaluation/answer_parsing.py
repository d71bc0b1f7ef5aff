"""From the model's text to an answer that a metric compares."""

from __future__ import annotations

import json
import re

from megatron_anymal.evaluation.samples import LETTERS, TaskSample
from megatron_anymal.evaluation.task import Task

_CAPTION = re.compile(r'"caption"\s*:\s*"((?:[^"\\]|\\.)*)"?')
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_AROUND = ",.!?;:'"


def parse_answer(task: Task, sample: TaskSample, text: str) -> str:
    """The answer in a text, by the task's parser.

    Returns:
        The text without surrounding white space (`text`), its first line (`first_line`), the caption of the last JSON
        object (`caption_json`), the letter of an option (`letter`), or 1 or 0 for the first yes or no (`yes_no`);
        empty if it holds no such answer. Open questions of a task with letters: the first line.
    """
    if task.parse == "caption_json":
        return caption_in_json(text)
    if task.parse == "yes_no":
        match = _YES_NO.search(text)
        return "" if match is None else str(int(match[1].lower() == "yes"))
    if task.parse == "letter" and sample.options:
        by_text = task.options is not None and task.options.scored_by == "texts"
        rules = (option_with_text, option_letter) if by_text else (option_letter, option_with_text)
        return rules[0](text, sample.options) or rules[1](text, sample.options)
    return text.strip() if task.parse == "text" else first_line(text)


def first_line(text: str) -> str:
    """The first line that is not empty, without surrounding white space."""
    return text.strip().partition("\n")[0].strip()


def caption_in_json(text: str) -> str:
    """The caption of section E.1's {"caption": ...}; the whole text if there is none, as some models omit the JSON.

    The last object counts, because a model may repeat the prompt's examples; an answer cut off within the caption
    counts up to there.
    """
    captions = _CAPTION.findall(text)
    if not captions:
        return first_line(text)
    try:
        return str(json.loads(f'"{captions[-1]}"')).strip()
    except ValueError:
        return captions[-1].strip()


def option_letter(text: str, options: tuple[str, ...]) -> str:
    """The letter of the option that a text names, by the rule of MMMU's evaluation; empty where it picks at random.

    "(B)" comes before "B " and that before "B."; without any, and in a text of more than five words, an option's text.
    Of several, the last one mentioned counts.
    """
    for mark in _AROUND:
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    for form, sought in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        mentioned = [letter for letter in letters if form.format(letter) in text]
        if mentioned:
            return max(mentioned, key=lambda letter: text.rfind(sought.format(letter)))
    if len(text.split()) <= 5:
        return ""
    lower = text.lower()
    mentioned = [letter for letter, option in zip(letters, options) if option.lower() in lower]
    return max(mentioned, key=lambda letter: lower.rfind(options[LETTERS.index(letter)].lower())) if mentioned else ""


def option_with_text(text: str, options: tuple[str, ...]) -> str:
    """The letter of the only option that equals a text, but for case and surrounding punctuation; else empty."""
    plain = [option.strip(_AROUND + ' \n"').lower() for option in options]
    wanted = first_line(text).strip(_AROUND + ' \n"').lower()
    return LETTERS[plain.index(wanted)] if plain.count(wanted) == 1 else ""
