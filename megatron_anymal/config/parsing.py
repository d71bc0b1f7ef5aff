"""Parsing of plain values into the dataclasses of the schema, with the key and its source in every error."""

from __future__ import annotations

import copy
import difflib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from megatron_anymal.config.schema import ConfigError, RunConfig


def from_dict(mapping: Mapping[str, Any], source: str = "") -> RunConfig:
    """Build the typed configuration from nested plain dicts and lists; missing keys take their defaults.

    Args:
        mapping: sections and values, such as `RunConfig.to_dict` returns.
        source: where the mapping came from, for messages.

    Raises:
        ConfigError: an unknown key (the message suggests the closest known one) or a value of the wrong type.
    """
    return SectionReader(source).read(mapping, RunConfig, "")


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of every leaf of nested dicts; an empty dict is a leaf."""
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


class SectionReader:
    """Converts plain values into the dataclasses of the schema; every error names the key and its source."""

    def __init__(self, source: str, interpolations: bool = False) -> None:
        self.where = f" ({source})" if source else ""
        # Before composition, any value may be an interpolation such as "${other.key}".
        self.interpolations = interpolations

    def read(self, value: Any, hint: Any, key: str) -> Any:
        """Convert `value` to the type `hint`; `key` is its dotted key.

        Raises:
            ConfigError: an unknown key or a value of the wrong type, named with its dotted key.
        """
        if self.interpolations and isinstance(value, str) and "${" in value:
            return value
        if _is_section(hint):
            return self._section(value, hint, key)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is dict:
            entries = self._mapping(value, key)
            if arguments[1] is Any:
                return copy.deepcopy(dict(entries))
            return {str(name): self.read(entry, arguments[1], f"{key}.{name}") for name, entry in entries.items()}
        if origin is list:
            if not isinstance(value, (list, tuple)):
                raise self._wrong(key, value, "a list")
            return [self.read(item, arguments[0], f"{key}[{index}]") for index, item in enumerate(value)]
        return self._scalar(value, hint, key)

    def _section(self, value: Any, hint: Any, key: str) -> Any:
        known = _fields(hint)
        arguments = {}
        for name, item in self._mapping(value, key).items():
            dotted = f"{key}.{name}" if key else str(name)
            if name not in known:
                raise ConfigError(f"unknown key {dotted}{self.where}. {_suggestion(key, str(name), list(known))}")
            arguments[name] = self.read(item, known[name], dotted)
        return hint(**arguments)

    def _mapping(self, value: Any, key: str) -> Mapping[Any, Any]:
        if not isinstance(value, Mapping):
            raise self._wrong(key or "the configuration", value, "a section of keys and values")
        return value

    def _scalar(self, value: Any, hint: type, key: str) -> Any:
        if hint is bool and isinstance(value, bool):
            return value
        if not isinstance(value, bool):
            if hint is int and isinstance(value, int):
                return value
            if hint is float and isinstance(value, (int, float)):
                return float(value)
            if hint is float and isinstance(value, str) and _is_number(value):
                # YAML 1.1 reads 1e-4 as text.
                return float(value)
            if hint is str and isinstance(value, str):
                return value
            if hint is str and isinstance(value, int):
                # trainer.precision: 32 without quotes.
                return str(value)
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise self._wrong(key, value, names[hint])

    def _wrong(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{key}={value!r}{self.where} must be {expected}, not {_type_name(value)}.")


def entry_of(key: str) -> str | None:
    """Return the entry of a dict of sections that `key` is or is inside ("data.train.x.path" -> "data.train.x")."""
    hint: Any = RunConfig
    parts = key.split(".")
    for index, part in enumerate(parts):
        if _is_section(hint):
            hint = _fields(hint).get(part)
        elif typing.get_origin(hint) is dict and _is_section(typing.get_args(hint)[1]):
            return ".".join(parts[: index + 1])
        else:
            return None
    return None


def hint_at(key: str) -> Any:
    """Return the type of a key in the schema; None if the key is unknown or inside a free-form dict."""
    hint: Any = RunConfig
    for part in key.split("."):
        if _is_section(hint):
            hint = _fields(hint).get(part)
        elif typing.get_origin(hint) is dict and _is_section(typing.get_args(hint)[1]):
            hint = typing.get_args(hint)[1]
        else:
            return None
    return hint


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


@cache
def _fields(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _all_keys() -> tuple[str, ...]:
    def walk(cls: Any, prefix: str) -> Iterator[str]:
        for name, hint in _fields(cls).items():
            yield f"{prefix}{name}"
            if _is_section(hint):
                yield from walk(hint, f"{prefix}{name}.")

    return tuple(walk(RunConfig, ""))


def _suggestion(section: str, name: str, siblings: list[str]) -> str:
    """Suggest a known key: the same name elsewhere, a similar one in this section, or a similar one elsewhere."""
    by_name = {key.rpartition(".")[2]: key for key in reversed(_all_keys())}
    if name in by_name:
        return f"Did you mean {by_name[name]}?"
    prefix = f"{section}." if section else ""
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"Did you mean {prefix}{near[0]}?"
    elsewhere = difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.7)
    if elsewhere:
        return f"Did you mean {by_name[elsewhere[0]]}?"
    return f"{section or 'The configuration'} holds {', '.join(siblings)}."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _type_name(value: Any) -> str:
    names = {str: "text", bool: "true/false", int: "a whole number", float: "a number", list: "a list"}
    if value is None:
        return "empty"
    return "a section" if isinstance(value, Mapping) else names.get(type(value), type(value).__name__)
