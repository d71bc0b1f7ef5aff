"""ShareGPT's layout and its variants: ShareGPT4V, and the `sharegpt` formatting of LLaMA-Factory.

An entry has `conversations` or `messages`, turns of `from` and `value` or of `role` and `content`, and the columns
`images`, `videos` and `audios` (or their singular), whose paths take the places of `<image>`, `<video>` and `<audio>`.
Optional: `system`, and `chosen` and `rejected` for a preference pair. Turns of tools are not supported. Other names of
columns: --column messages=NAME, image=NAME, video=NAME, audio=NAME, system=NAME.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_anymal.data.json_array import read_objects
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.data.source_records import Record
from megatron_anymal.data.sources.conversations import KINDS, media_paths, messages_of, turns_of
from megatron_anymal.data.sources.source_format import FileSource, Peek, SourceFormat, SourceOptions, clean_key

_ROLES = ("messages", *KINDS, "system")


class ShareGptSource(FileSource):
    """The conversations of a file in ShareGPT's layout.

    Args:
        options: `path` is a .json or .jsonl file; `media` the folder that its paths are relative to.

    Raises:
        DataError: --column names a role that the layout does not have, or a column that the first entry lacks.
    """

    def __init__(self, options: SourceOptions):
        super().__init__(options)
        first = Peek.of(options.path).first
        for role, name in options.columns.items():
            if role not in _ROLES:
                raise DataError(f"--column {role}={name}: sharegpt has the roles {', '.join(_ROLES)}.")
            if role == "messages" and name not in first:
                raise DataError(f"--column {role}={name}: {str(options.path)!r} has the columns {', '.join(first)}.")

    def records(self) -> Iterator[Record]:
        """One sample per conversation.

        Raises:
            DataError: the file is not a JSON array of objects.
        """
        for where, number, entry in read_objects(self.options.path, self.options.limits):
            key = clean_key(number, entry.get("id"))
            try:
                value = self._value(entry)
            except SampleError as error:
                yield Record(where, number, key=key, wrong=error)
            else:
                yield Record(where, number, value, key, entry)

    def _value(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        columns = self.options.columns
        if entry.get("tools"):
            raise SampleError("text", "it calls tools, which are not supported.")
        name = columns.get("messages") or ("messages" if "messages" in entry else "conversations")
        turns = turns_of(entry.get(name))
        if system := entry.get(columns.get("system", "system")):
            turns.insert(0, ("system", system))
        media = {}
        for kind in KINDS:
            names = (columns[kind],) if kind in columns else (f"{kind}s", kind)
            present = [name for name in names if name in entry]
            if present or kind == "image":
                media[kind] = media_paths(entry[present[0]], present[0]) if present else []
        value: dict[str, Any] = {"messages": messages_of(turns, media)}
        for name in ("chosen", "rejected"):
            if name in entry:
                value[name] = _answer(entry[name], name)
        return value


def _answer(value: Any, name: str) -> str:
    if isinstance(value, dict):
        value = turns_of([value])[0][1]
    if not isinstance(value, str):
        raise SampleError("text", f"its `{name}` is not a text.")
    return value


def _recognizes(peek: Peek) -> bool:
    # Samples of this package have `messages` too, with roles in them and media as parts.
    return any(isinstance(item, list) and item and _is_turn(item[0]) for item in peek.first.values())


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ({"from", "value"} <= value.keys() or {"role", "content"} <= value.keys())


FORMAT = SourceFormat(
    "sharegpt",
    "a .json or .jsonl of `conversations` or `messages`, with `images`, `videos`, `audios`",
    frozenset({"media", "column"}),
    _recognizes,
    ShareGptSource,
)
