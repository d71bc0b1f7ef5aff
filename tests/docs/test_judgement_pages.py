"""The guides on comparison and synthesis: their commands run, and their tables match the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

from chat_server import good, serving
from commands import PAGES, blocks, run
from judgements import make_prompts, row, served, write_lines
from ports import free_port
from tiny import png

from megatron_anymal.cli import compare, synthesize
from megatron_anymal.synthesis.tasks import shipped_tasks

COMPARISON = PAGES["docs/guides/comparison.md"]
SYNTHESIS = PAGES["docs/guides/synthesis.md"]


def lines_of(page: str) -> list[str]:
    """Commands in text blocks: those that serve, or need a server."""
    return [line for block in blocks(page, "text") for line in block.splitlines() if line.startswith("anymal ")]


def test_comparison_commands(tmp_path: Path) -> None:
    make_prompts(tmp_path / "source", 3)
    for old, new in (("a", "ours"), ("b", "theirs")):
        (tmp_path / "source" / f"{old}.jsonl").rename(tmp_path / "source" / f"{new}.jsonl")
    [serve, report] = [line for line in lines_of(COMPARISON) if "ours.jsonl" in line]
    # The page's port may be in use.
    words = [str(free_port()) if word == "8765" else word for word in shlex.split(serve)[1:]]
    process, _ = served(tmp_path / "source", words=words)
    write_lines(tmp_path / "source" / "comparison" / "judgements.jsonl", [row("q0", "ann", "a"), row("q1", "ann", "b")])
    printed = run(report, tmp_path / "source")
    assert "2 judgement(s) of 2 of 3 items" in printed and "2 pair(s), 1 without (not judged)" in printed
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(240) == 0
    names = set(
        re.findall(r"`([\w.]+\.(?:jsonl?|md|html))`", COMPARISON.partition("## Results")[2].partition("- **")[0])
    )
    assert names == {path.name for path in (tmp_path / "source" / "comparison").iterdir()} | {
        "answers_a.jsonl",
        "answers_b.jsonl",
    }


def test_models_are_compared(quickstart_folder: Path, tmp_path: Path) -> None:
    """The first command, with the quickstart's runs."""
    shutil.copytree(quickstart_folder, tmp_path / "runs" / "quickstart")
    for name in ("sft", "dpo"):
        (tmp_path / "runs" / name).symlink_to("quickstart/align_video")
    write_lines(tmp_path / "prompts.jsonl", [{"parts": [{"text": f"question {n}"}]} for n in range(2)])
    [command] = [line for line in lines_of(COMPARISON) if "runs/sft" in line]
    times = []
    for _ in range(2):
        assert "0 judgement(s) of 0 of 2 items" in run(f"{command} --report-only --max-new-tokens=4", tmp_path)
        times.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "comparison").glob("answers_*")})
    # The second start has the answers of the first.
    assert times[0] == times[1] and set(times[0]) == {"answers_a.jsonl", "answers_b.jsonl"}


def test_comparison_options_are_listed() -> None:
    reference = PAGES["docs/reference/cli.md"].partition("## anymal compare")[2].partition("\n## ")[0]
    own = {text for action in compare._parser()._actions[:9] for text in action.option_strings if text.startswith("--")}
    assert own - {"--help"} == set(re.findall(r"^\| `(--[\w-]+)`", reference, re.M))


def test_synthesis_commands(tmp_path: Path, tokenizer_folder: str) -> None:
    """The manifest line and the commands of the guide."""
    [line] = [line for block in blocks(SYNTHESIS, "text") for line in block.splitlines() if line.startswith("{")]
    (tmp_path / "cat.jpg").write_bytes(png(1))
    (tmp_path / "captions.jsonl").write_text(line.replace("grey cat", "grey sample-1"))
    ask, pack = lines_of(SYNTHESIS)
    with serving() as server:
        command = ask.replace("http://localhost:8000", server.url)
        assert "1 sample(s): 1 conversation(s), 0 dropped" in run(command, tmp_path)
        [body] = server.bodies
    assert body["model"] == "MODEL" and "cat: 0.1, 0.3, 0.5, 0.8" in body["messages"][1]["content"]
    [conversation] = map(json.loads, (tmp_path / "conversations.jsonl").read_text().splitlines())
    assert conversation["messages"][1]["content"] == json.loads(good("sample-1"))["conversation"][0]["answer"]
    assert "1 sample" in run(pack.replace("TOKENIZER", tokenizer_folder), tmp_path)


def test_tasks_and_options_of_synthesis_are_listed() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", SYNTHESIS.partition("| task |")[2].partition("\n\n")[0], re.M))
    assert table == {name: task.about for name, task in shipped_tasks().items()}
    reference = PAGES["docs/reference/cli.md"].partition("## anymal synthesize")[2].partition("\n## ")[0]
    rows: dict[str, Any] = dict(re.findall(r"^\| `(--[\w-]+)` \|\s*`?([^`|]*?)`?\s*\|", reference, re.M))
    options = {action.option_strings[-1]: action.default for action in synthesize._parser()._actions[1:]}
    assert rows == {name: f"{d:g}" if isinstance(d, (int, float)) and d else d or "" for name, d in options.items()}
