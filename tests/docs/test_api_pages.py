"""The API pages show every public class and function, and their docstrings state shapes, units and errors."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import griffe
import pytest
from docstring_rules import (
    ROOT,
    Definition,
    definitions,
    modules,
    public,
    tree,
    undocumented,
    without_shape,
    without_unit,
)
from raised import Raised, ancestors

PAGES = ROOT / "docs" / "reference" / "api"
# Modules that are not part of the API, by name or prefix -> where they are documented.
ELSEWHERE = {
    "megatron_anymal.__main__": "the command anymal: docs/reference/cli.md",
    "megatron_anymal.cli": "its subcommands: docs/reference/cli.md",
}
# Definition -> exceptions that it cannot raise although the source suggests it, and why.
NEVER_RAISED = {
    "data.index_builder.IndexOptions.kind_of": ({"ConfigError"}, "it only asks for registered kinds"),
    "data.indexed_shards.indexed_shards": ({"DataError"}, "a damaged index counts as none, of which nothing is read"),
    "judgement.items.read_questions": ({"ConfigError"}, "it only asks for registered kinds"),
    "synthesis.tasks.shipped_tasks": ({"DataError"}, "the package's own files have the form of a task"),
    "data.lint.Reading.without_configuration": ({"ConfigError"}, "the stand-ins are sections of this package"),
    "data.loader.MicroBatchReader.__getitem__": ({"DataError"}, "it pads documents to the plan's multiple"),
    "data.prompt_encoder.PromptReader.read": ({"ConfigError"}, "it only asks for kinds of modalities that were built"),
    "data.manifest_parts.write_part": ({"StorageError"}, "anymal prepare refuses --out on an object store"),
    "data.prompt_encoder.PromptReader.read_answered": ({"ConfigError"}, "as `read`"),
    "model.anymal.AnyMALModel.forward": ({"DataError"}, "the reader has padded the documents of a micro-batch"),
    "model.anymal.AnyMALModel.embed": ({"DataError"}, "the reader has padded the documents of a micro-batch"),
    "hf.remote_code.foreign_code": (
        {"ConfigError"},
        "_code reports plug-ins and modules that cannot be copied; without plug-ins it copies this package's own",
    ),
}
# Passed on by `except BaseException: ...; raise`, and by a method that subclasses implement.
NOT_ERRORS = {"BaseException", "NotImplementedError"}


def api_modules() -> list[str]:
    """Modules that must be on a page: those that define something public."""
    ours = [name for name in modules() if not any(name == x or name.startswith(f"{x}.") for x in ELSEWHERE)]
    return [name for name in ours if any(public(node) for node in tree(name).body)]


def on_pages() -> list[tuple[str, Path]]:
    """Each `::: module` of the pages."""
    return [(m[1], page) for page in PAGES.glob("*.md") for m in re.finditer(r"^::: (\S+)$", page.read_text(), re.M)]


def without_error(item: Definition) -> Iterator[str]:
    """Exceptions that are raised but not documented: neither they nor a base class of the package or of Python."""
    errors = raised_by(item) - NOT_ERRORS
    for error in sorted(errors - NEVER_RAISED.get(short(item), (set(), ""))[0]):
        names = ancestors()[error] - {"Exception", "BaseException", "object"}
        if not any(re.search(rf"\b{name}\b", item.doc.text) for name in names):
            yield f"{item}: raises {error}"


def raised_by(item: Definition) -> set[str]:
    """Exceptions that a function or method, or the constructor of a class, raises."""
    source = Raised.of(item.module)
    name = f"{item.name}.__init__" if isinstance(item.node, ast.ClassDef) else item.name
    return source.by(name) if name in source.functions else set()


def short(item: Definition) -> str:
    return f"{item.module}.{item.name}".removeprefix("megatron_anymal.")


def test_every_module_is_on_one_page() -> None:
    counts = Counter(name for name, _ in on_pages())
    assert sorted(counts) == api_modules()
    assert not [name for name, count in counts.items() if count > 1]


def test_pages_show_all_members() -> None:
    """No page lists the members of a module: a list goes stale."""
    assert not [page.name for page in PAGES.glob("*.md") if "members:" in page.read_text()]


def test_pages_are_in_the_navigation_and_the_index() -> None:
    index, navigation = (PAGES / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in PAGES.glob("*.md"):
        assert f"reference/api/{page.name}" in navigation, page.name
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


@pytest.mark.parametrize("rule", [undocumented, without_shape, without_unit, without_error])
def test_docstrings(rule: Callable[[Definition], Iterator[str]]) -> None:
    wrong = [text for name in api_modules() for item in definitions(name) for text in rule(item)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_exceptions_are_needed() -> None:
    items = {short(item): item for name in api_modules() for item in definitions(name)}
    for name, (errors, _) in NEVER_RAISED.items():
        assert errors <= raised_by(items[name]), name
    for name in ELSEWHERE:
        assert name in modules(), name


def test_comments_appear_on_the_pages() -> None:
    extensions = griffe.load_extensions(str(ROOT / "docs" / "field_comments.py"))
    package = griffe.load("megatron_anymal", search_paths=[ROOT], extensions=extensions, allow_inspection=False)
    for name in api_modules():
        for item in definitions(name):
            members = package[short(item)].members if item.fields else {}
            for field, text in item.fields.items():
                in_table = field in item.doc.sections.get("Attributes", {})
                shown = members[field].docstring if field in members else None
                assert in_table or (shown and shown.value.split() == text.split()), f"{item}: {field}"
