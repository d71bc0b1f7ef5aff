"""Small comparisons for tests: prompts about pictures, two files of answers, and rows of a journal."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fork_server
from tiny import WORDS, flac, npy, png

from megatron_anymal.judgement.items import JudgedItem, read_answers, read_questions


def make_prompts(folder: Path, count: int) -> str:
    """Write prompts with a picture, a sound or a motion signal each, and two files of answers; return their path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for number in range(count):
        extension, maker = (("png", png), ("flac", flac), ("npy", npy))[number % 3]
        (folder / f"{number}.{extension}").write_bytes(maker(number))
        medium = {"media": f"{number}.{extension}", **({"rate": 50} if extension == "npy" else {})}
        content = [{"text": f"what is this {WORDS[number % 10]}"}, medium]
        messages = [{"role": "user", "content": content}]
        lines.append({"key": f"q{number}", **({"messages": messages} if number % 2 else {"parts": content})})
    write_lines(folder / "prompts.jsonl", lines)
    for name, word in (("a", "seven"), ("b", "nine")):
        answers = [{"prompt": number, "answer": f"{WORDS[number % 10]} {word}"} for number in range(count)]
        write_lines(folder / f"{name}.jsonl", answers)
    return str(folder / "prompts.jsonl")


def make_items(folder: Path, count: int) -> list[JudgedItem]:
    """The items of `make_prompts`."""
    questions = read_questions(make_prompts(folder, count))
    a, b = (read_answers(str(folder / f"{name}.jsonl"), questions) for name in "ab")
    return [JudgedItem(*item) for item in zip(questions, a, b)]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def row(
    item: str, annotator: str, choice: str, a: tuple[int, int, int] = (2, 2, 2), b: Any = (1, 0, 2)
) -> dict[str, Any]:
    """A row of a journal."""
    names = ("recognition", "accuracy", "integrity")
    scores = {"a": dict(zip(names, a)), "b": dict(zip(names, b))}
    return {"item": item, "annotator": annotator, "choice": choice, "first": "a", "scores": scores}


SOURCES = ("compare", "source/a.jsonl", "source/b.jsonl", "--prompts=source/prompts.jsonl", "--out=out")


def served(folder: Path, *arguments: str, words: Sequence[str] = SOURCES) -> tuple[fork_server.Interpreter, str]:
    """`anymal compare` in a process of its own, on folder/source; the process and the page's address."""
    log = folder / "compare.log"
    process = fork_server.Interpreter("-m", "megatron_anymal", *words, *arguments, output=[log], cwd=folder)
    deadline = time.monotonic() + 240
    while not (match := re.search(r"http://\S+", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return process, match[0]
