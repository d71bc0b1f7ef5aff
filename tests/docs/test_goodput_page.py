"""The goodput page shows what its commands print, and lists every input with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import PAGES, run

from megatron_anymal.planning.goodput_inputs import INPUTS

PAGE = PAGES["docs/operations/goodput.md"]
EXAMPLES = re.findall(r"^```bash\n(anymal [^\n]*)\n```\n\n```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(2))
def test_the_output_is_that_of_the_command(number: int, tmp_path: Path) -> None:
    """Three points stand for lines that are left out."""
    command, shown = EXAMPLES[number]
    printed = run(command, tmp_path)
    at = 0
    for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE):
        assert part in printed[at:], part
        at = printed.index(part, at) + len(part)
    assert "\n...\n" in f"\n{shown}" or shown == printed


def test_all_examples_are_compared() -> None:
    assert len(EXAMPLES) == 2


def test_the_table_lists_all_inputs() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `--")]
    shown = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in lines]
    expected = [
        (item.option, f"{item.default:.6g}" if item.default is not None else "", item.help, item.source)
        for item in INPUTS
    ]
    assert shown == expected
