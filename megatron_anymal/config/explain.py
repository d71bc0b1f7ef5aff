"""What every configuration key means: `--print-config --explain`, and the page docs/reference/configuration.md.

python -m megatron_anymal.config.explain > docs/reference/configuration.md
"""

from __future__ import annotations

import inspect
import json
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from megatron_anymal.config.field_docs import field_docs
from megatron_anymal.config.parsing import leaves
from megatron_anymal.config.schema import RunConfig


def documentation(key: str) -> str:
    """What a dotted key means; empty inside a free-form dict, such as model.language_model.config.vocab_size."""
    section: Any = RunConfig
    text = ""
    for name in key.split("."):
        if typing.get_origin(section) is dict:
            section, text = typing.get_args(section)[1], ""
            continue
        if not is_dataclass(section):
            return ""
        text = field_docs(typing.cast(type, section)).get(name, "")
        section = typing.get_type_hints(section).get(name)
    return text


def explain(values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Every value of a composed configuration with its origin and documentation, in the order of the schema."""
    blocks = []
    for key, value in leaves(values):
        lines = [f"{key}: {json.dumps(value)}  ({origins[key]})"]
        lines += textwrap.wrap(documentation(key), 112, initial_indent="    ", subsequent_indent="    ")
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def configuration_page() -> str:
    """The reference of all keys as Markdown, one table per section."""
    lines = [
        "# Configuration",
        "",
        "Every key, its default and its meaning, from the dataclasses in `megatron_anymal/config/`. `anymal pretrain",
        "--config-name=CONFIG --print-config --explain` shows the same text with a run's own values. In the headings,",
        "NAME stands for a name of your choice.",
    ]
    for prefix, section in _sections(RunConfig, ""):
        summary = inspect.cleandoc((section.__doc__ or "").partition("\n\nFields:")[0])
        lines += [
            "",
            f"## {prefix or 'Top level'}",
            "",
            summary,
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        docs = field_docs(section)
        for field in fields(section):
            if not _holds_sections(typing.get_type_hints(section)[field.name]):
                default = f"`{json.dumps(_default(field))}`"
                lines.append(f"| `{field.name}` | `{field.type}` | {default} | {docs[field.name]} |")
    return "\n".join([*lines, ""])


def _sections(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted prefix and dataclass of each section, parents first."""
    if any(not _holds_sections(hint) for hint in typing.get_type_hints(section).values()):
        yield prefix, section
    for name, hint in typing.get_type_hints(section).items():
        dotted = f"{prefix}.{name}" if prefix else name
        if is_dataclass(hint):
            yield from _sections(hint, dotted)
        elif _holds_sections(hint):
            entry = typing.get_args(hint)[1]
            if name != "validation":
                yield from _sections(entry, f"{dotted}.NAME")
        elif typing.get_origin(hint) is list and is_dataclass(typing.get_args(hint)[0]):
            yield from _sections(typing.get_args(hint)[0], f"{dotted}[N]")


def _holds_sections(hint: Any) -> bool:
    return is_dataclass(hint) or (typing.get_origin(hint) is dict and is_dataclass(typing.get_args(hint)[1]))


def _default(field: Any) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


if __name__ == "__main__":
    print(configuration_page(), end="")
