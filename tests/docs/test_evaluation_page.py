"""The page on benchmarks lists all tasks, options and metrics, and its task file is one."""

from __future__ import annotations

import re
from pathlib import Path

from commands import PAGES, blocks

from megatron_anymal.cli.evaluate import _parser
from megatron_anymal.evaluation.task import METRICS, PARSERS, read_task
from megatron_anymal.evaluation.task_files import task_paths

PAGE = PAGES["docs/guides/evaluation.md"]


def test_tasks_metrics_and_parsers_are_listed() -> None:
    table = PAGE.partition("## The tasks")[2].partition("## Run it")[0]
    assert set(task_paths()) == set(re.findall(r"`([a-z0-9_]+)`", table))
    keys = PAGE.partition("## Your own task")[2]
    # mathvista_accuracy reads columns that only MathVista's reader provides.
    assert set(METRICS) - {"mathvista_accuracy"} <= set(re.findall(r"`([a-z_]+)`", keys))
    assert set(PARSERS) <= set(re.findall(r"`([a-z_]+)`", keys))


def test_the_options_of_both_pages_are_all() -> None:
    [group] = [group for group in _parser()._action_groups if group.title == "benchmarks"]
    options = {text for action in group._group_actions for text in action.option_strings}
    table = PAGES["docs/reference/cli.md"].partition("## anymal evaluate")[2].partition("\n## ")[0]
    assert options and all(f"| `{option}` |" in table and option in PAGE for option in options)


def test_the_task_file_can_be_read(tmp_path: Path) -> None:
    [text] = blocks(PAGE, "yaml")
    (tmp_path / "pictures.yaml").write_text(text)
    assert read_task(tmp_path / "pictures.yaml").metrics == ("exact_match", "anls")
