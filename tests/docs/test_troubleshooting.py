"""The messages that the troubleshooting page quotes match the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations" / "troubleshooting.md").read_text()
# Stands for a value in a message: no quotation contains it.
VALUE = "\0"
# Values in a quotation, with full stops next to them.
VALUES = re.compile(r"\.{3,}")
# A quotation needs at least one constant part of this length, or it could be found anywhere.
SHORTEST = 8
# A code span, in one or two backticks, whose content is in quotation marks.
MESSAGE = re.compile(r'(?<!`)(`{1,2})"((?:(?!\1).)+)"\1(?!`)')


def rows() -> list[list[str]]:
    """Cells of every table row without the headers."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row != ["You see", "Cause", "Fix"] and set(row) != {"---"}]


def quoted() -> list[str]:
    """Messages in first columns and in the list items that begin with one."""
    items = [line for line in PAGE.splitlines() if line.startswith('- `"')]
    return [match[2] for text in [*(row[0] for row in rows()), *items] for match in MESSAGE.finditer(text)]


def constants(node: ast.AST) -> Iterator[str]:
    """String constants of a statement in the order of its source; VALUE wherever a value is inserted."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
        return
    for child in ast.iter_child_nodes(node):
        yield from constants(child)
    if not isinstance(node, ast.JoinedStr):
        yield VALUE


@cache
def statements() -> tuple[str, ...]:
    """The text of every statement and, of shell scripts, of every line."""
    kinds = (ast.Raise, ast.Expr, ast.Assign, ast.AnnAssign, ast.Return)
    texts = []
    for folder in ("megatron_anymal", "checkpoint_tools", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                if isinstance(node, kinds) and not docstring:
                    texts.append("".join(constants(node)))
    for path in sorted((ROOT / "slurm").glob("*.sh")):
        texts += path.read_text().splitlines()
    return tuple(texts)


def occurs(message: str) -> bool:
    """Whether one statement contains all constant parts of a message, in order."""
    parts = [part for part in VALUES.split(message) if part.strip()]
    if not any(len(part) >= SHORTEST for part in parts):
        return False
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in statements())


@pytest.mark.parametrize("message", quoted())
def test_message_is_in_the_code(message: str) -> None:
    assert occurs(message)


@pytest.mark.parametrize("message", quoted())
def test_misspelt_message_is_not(message: str) -> None:
    part = max(VALUES.split(message), key=len)
    middle = len(part) // 2
    assert not occurs(message.replace(part, part[:middle] + "~" + part[middle + 1 :]))


def test_entries() -> None:
    assert len(quoted()) >= 40
    assert len(set(quoted())) == len(quoted())
    assert all(len(row) == 3 and all(row) for row in rows())
    seen = [row[0] for row in rows()]
    assert len(set(seen)) == len(seen) >= 45


def test_quotations_in_first_columns_are_checked() -> None:
    """A quotation that the pattern above overlooks would not be compared with the code."""
    for row in rows():
        assert row[0].count('`"') == len(MESSAGE.findall(row[0])), row[0]
