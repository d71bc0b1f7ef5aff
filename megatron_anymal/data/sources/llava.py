"""LLaVA's instruction data, such as llava_v1_5_mix665k.json: an array of conversations about images or videos.

An entry has `id`, `image` and/or `video` (a path or a list of them; none for text only), and `conversations`, turns of
`from` (human, gpt) and `value`. `<image>` and `<video>` in the text stand where the media belong. Video variants of
LLaVA write `<image>` for a video, too; that is accepted where an entry has videos and no image. Turns are kept as they
are, also a first answer without a question, which LLaVA's own loader skips.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_anymal.data.json_array import read_objects
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.data.source_records import Record
from megatron_anymal.data.sources.conversations import media_paths, messages_of, turns_of
from megatron_anymal.data.sources.source_format import FileSource, Peek, SourceFormat, clean_key


class LlavaSource(FileSource):
    """The conversations of a file in LLaVA's layout.

    Args:
        options: `path` is a .json or .jsonl file; `media` the folder that its paths are relative to.
    """

    def records(self) -> Iterator[Record]:
        """One sample per conversation.

        Raises:
            DataError: the file is not a JSON array of objects.
        """
        for where, number, entry in read_objects(self.options.path, self.options.limits):
            key = clean_key(number, entry.get("id"))
            try:
                value = {"messages": _messages(entry)}
            except SampleError as error:
                yield Record(where, number, key=key, wrong=error)
            else:
                yield Record(where, number, value, key, entry)


def _messages(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = turns_of(entry.get("conversations"))
    media = {
        kind: media_paths(entry.get(kind), kind) for kind in ("image", "video") if kind == "image" or kind in entry
    }
    if media.get("video") and not media["image"]:
        turns = [(role, text.replace("<image>", "<video>") if isinstance(text, str) else text) for role, text in turns]
    return messages_of(turns, media)


def _recognizes(peek: Peek) -> bool:
    return "conversations" in peek.first


FORMAT = SourceFormat(
    "llava", "a .json of `conversations` with `image` or `video`", frozenset({"media"}), _recognizes, LlavaSource
)
