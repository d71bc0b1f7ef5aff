"""Energon data sets: shards with a folder `.nv-meta`, whose dataset.yaml maps members of the shards to fields.

Sample types: CaptioningSample, TextSample, VQASample and VidQASample. Others, and those that a sample_loader.py
creates, are refused: their samples are made by code. Captions in a .txt next to one picture are indexed in place if
the split has every shard of the folder; everything else is packed again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

from megatron_anymal.data.json_text import parse_json_text
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_samples import Group, MemberCounts, SampleError, groups
from megatron_anymal.data.source_records import Record, Source
from megatron_anymal.data.sources.conversations import messages_of
from megatron_anymal.data.sources.source_format import ShardFolder, SourceFormat, SourceOptions, clean_key
from megatron_anymal.data.tar.byte_source import LocalBytes
from megatron_anymal.data.tar.reader import TarError, TarWalk

META = ".nv-meta"
# Sample type without "Sample" or "Webdataset" -> kind of its medium ("" for none), and the fields of its texts.
_TYPES = {
    "Captioning": ("image", ("caption",)),
    "Text": ("", ("text",)),
    "VQA": ("image", ("context", "answers")),
    "VidQA": ("video", ("context", "answers")),
}
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")


@dataclass(frozen=True)
class _DataSet:
    """Content of `.nv-meta`."""

    # A key of _TYPES.
    type: str
    # Field -> members.
    fields: Mapping[str, str]
    # Shards of the split.
    shards: Sequence[Path]
    # Shards, and keys in the form SHARD/KEY, that are excluded; paths relative to the data set.
    excluded: frozenset[str]


def open_energon(options: SourceOptions) -> Union[Source, ShardFolder]:
    """The data set, in place if its shards are as `anymal prepare --index-only` reads them.

    Raises:
        DataError: the data set lacks a file, has another sample type, or has no such split.
    """
    data = _data_set(options.path, options.split or "train")
    folders = {shard.parent for shard in data.shards}
    kind, texts = _TYPES[data.type]
    medium = data.fields[kind] if kind else ""
    plain = re.fullmatch(r"[\w.]*", medium) and len(texts) == 1 and data.fields[texts[0]] == "txt"
    if plain and not data.excluded and len(folders) == 1:
        [folder] = folders
        if sorted(folder.glob("*.tar")) == sorted(data.shards):
            return ShardFolder(str(folder), [name for name in (medium, "txt") if name])
    return EnergonSource(options, data)


class EnergonSource(Source):
    """The samples of an energon data set, read from its shards."""

    def __init__(self, options: SourceOptions, data: _DataSet):
        super().__init__(str(options.path), options.path)
        self._options, self._data = options, data

    def files(self) -> Sequence[Path]:
        """The shards, and the files that describe them."""
        return [*self._data.shards, *(self._options.path / META / name for name in ("dataset.yaml", "split.yaml"))]

    def settings(self) -> Mapping[str, Any]:
        """The split."""
        return {"split": self._options.split}

    def records(self) -> Iterator[Record]:
        """One sample per group of members; damaged places of a shard are records that cannot be used.

        Raises:
            DataError: a shard cannot be read at all.
        """
        number = 0
        for shard in self._data.shards:
            name = shard.relative_to(self._options.path).as_posix()
            for group in self._groups(shard):
                if isinstance(group, Group) and f"{name}/{group.key}" in self._data.excluded:
                    continue
                number += 1
                yield self._record(number, name, shard, group)

    def _groups(self, shard: Path) -> Iterator[Union[Group, LeftOut]]:
        problems: list[LeftOut] = []
        try:
            with shard.open("rb") as file:
                walk = TarWalk(LocalBytes(file.fileno()), self._options.limits.max_text_bytes)
                yield from groups(walk, shard.name, MemberCounts(), problems)
        except (TarError, OSError) as error:
            raise DataError(f"{shard}: {error}. Repair the shard, or take it out of {META}/split.yaml.") from None
        yield from (problem for problem in problems if not problem.is_note)

    def _record(self, number: int, name: str, shard: Path, group: Union[Group, LeftOut]) -> Record:
        if isinstance(group, LeftOut):
            wrong = SampleError(group.code, f"bytes from {group.offset}: {group.reason}.")
            return Record(name, number, key=clean_key(number), wrong=wrong)
        where, key = f"{name}/{group.key}", clean_key(number, group.key)
        try:
            if group.wrong or group.torn:
                raise group.wrong or SampleError("torn", f"it may be incomplete: {group.torn}.")
            value, contents = self._value(shard, group)
            return Record(where, number, value, key, contents=contents)
        except SampleError as error:
            return Record(where, number, key=key, wrong=error)

    def _value(self, shard: Path, group: Group) -> tuple[dict[str, Any], dict[str, Any]]:
        kind, texts = _TYPES[self._data.type]
        names, contents = [], {}
        if kind:
            ending = self._medium(group, self._data.fields[kind])
            member = group.members[ending]
            names, contents = (
                [f"media.{ending}"],
                {f"media.{ending}": partial(_read, shard, member.offset, member.size)},
            )
        media = [{"media": name, "modality": kind} for name in names]
        if len(texts) == 1:
            return {"parts": [*media, {"text": self._text(shard, group, texts[0])}]}, contents
        question, answer = self._text(shard, group, "context"), self._answer(shard, group)
        if f"<{kind}>" not in question:
            question = f"<{kind}>{question}"
        return {"messages": messages_of([("user", question), ("assistant", answer)], {kind: names})}, contents

    def _medium(self, group: Group, field: str) -> str:
        for ending in field.split(","):
            if ending.lower() in group.members:
                return ending.lower()
        raise SampleError("missing_media", f"it has no member {field!r}.")

    def _answer(self, shard: Path, group: Group) -> str:
        """The answer with the largest weight; the first one without weights."""
        answers = self._field(shard, group, self._data.fields["answers"])
        if isinstance(answers, list) and answers:
            weights = self._data.fields.get("answer_weights")
            values = self._field(shard, group, weights) if weights else None
            best = values.index(max(values)) if isinstance(values, list) and len(values) == len(answers) else 0
            answers = answers[best]
        return _require_text("answers", answers)

    def _text(self, shard: Path, group: Group, name: str) -> str:
        return _require_text(name, self._field(shard, group, self._data.fields[name]))

    def _field(self, shard: Path, group: Group, field: str) -> Any:
        """The value that an entry of the field map, such as `txt` or `json[0][value]`, selects."""
        for option in field.split(","):
            match = _FIELD.fullmatch(option)
            if match is None or match[1].lower() not in group.members:
                continue
            member = group.members[match[1].lower()]
            if member.size > self._options.limits.max_text_bytes:
                raise SampleError(
                    "limit", f"its {match[1]!r} has {member.size} bytes, above data.limits.max_text_bytes."
                )
            data = _read(shard, member.offset, member.size)
            return self._select(data, match[1], re.findall(r"\[([^\]]+)\]", match[2]))
        raise SampleError("text", f"it has no member {field!r}.")

    def _select(self, data: bytes, name: str, steps: Sequence[str]) -> Any:
        try:
            if name.rpartition(".")[2] != "json":
                return data.decode("utf-8-sig")
            value = parse_json_text(data, f"its {name}", self._options.limits)
            for step in steps:
                value = value[int(step)] if isinstance(value, list) else value[step]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise SampleError(
                "text", f"its {name} has no {''.join(f'[{step}]' for step in steps)} ({error})."
            ) from None
        return value


def _read(shard: Path, offset: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _require_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SampleError("text", f"its {name} is not a text: {str(value)[:60]!r}.")
    return value.strip()


def _data_set(path: Path, split: str) -> _DataSet:
    described, splits = (_yaml(path / META / name) for name in ("dataset.yaml", "split.yaml"))
    where = f"{path / META / 'dataset.yaml'}"
    loader = [name for name in ("sample_loader", "part_filter", "subflavors_loader") if name in described]
    stated = described.get("sample_type", described)
    name = str(stated.get("__class__", "")) if isinstance(stated, dict) else ""
    kind = re.sub(r"(Sample|Webdataset)$", "", name)
    if loader or kind not in _TYPES:
        what = f"its samples are made by code ({loader[0]})" if loader else f"the sample type {name!r} is not supported"
        known = ", ".join(f"{kind}Sample" for kind in _TYPES)
        raise DataError(f"{where}: {what}. Supported are {known} with a field_map; write others to a manifest.")
    fields = {key: str(value) for key, value in (described.get("field_map") or {}).items()}
    medium, texts = _TYPES[kind]
    for field in (medium, *texts):
        if field and field not in fields:
            raise DataError(f"{where}: its field_map does not name `{field}` of {name}.")
    parts = splits.get("split_parts") or {}
    if split not in parts:
        raise DataError(f"{path / META / 'split.yaml'}: there is no split {split!r}; add --split {'|'.join(parts)}.")
    excluded = frozenset(map(str, splits.get("exclude") or []))
    return _DataSet(kind, fields, list(_shards(path, parts[split], excluded)), excluded)


def _shards(path: Path, names: Sequence[str], excluded: frozenset[str]) -> Iterator[Path]:
    from braceexpand import braceexpand

    for pattern in names:
        for name in braceexpand(pattern):
            if name not in excluded:
                if not (path / name).is_file():
                    raise DataError(f"{path / META / 'split.yaml'} names the shard {name!r}, which does not exist.")
                yield path / name


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value: Optional[Any] = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise DataError(f"There is no {str(path)!r}: run `energon prepare` there, or use --index-only.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML ({' '.join(str(error).split())}).") from None
    return value if isinstance(value, dict) else {}


FORMAT = SourceFormat(
    "energon",
    "a folder with .nv-meta: captions, texts, questions and answers",
    frozenset({"split"}),
    lambda peek: META in peek.names,
    open_energon,
)
