"""The layouts that `anymal prepare --from` reads."""

from __future__ import annotations

import difflib
from typing import Optional, Union

from megatron_anymal.data.records import DataError
from megatron_anymal.data.source_records import Source
from megatron_anymal.data.sources import (
    coco,
    ego4d_imu,
    energon,
    huggingface,
    img2dataset,
    llava,
    sharegpt,
    sound_captions,
)
from megatron_anymal.data.sources.source_format import Peek, ShardFolder, SourceFormat, SourceOptions

FORMATS: dict[str, SourceFormat] = {
    one.name: one
    for one in (
        llava.FORMAT,
        sharegpt.FORMAT,
        coco.FORMAT,
        sound_captions.AUDIOCAPS,
        sound_captions.CLOTHO,
        img2dataset.FORMAT,
        energon.FORMAT,
        huggingface.FORMAT,
        ego4d_imu.FORMAT,
    )
}


def open_source(name: str, options: SourceOptions) -> Union[Source, ShardFolder]:
    """Open a data set.

    Args:
        name: a key of FORMATS.

    Raises:
        DataError: there is no such layout or file, the file has another layout (the likely one is named), or an option
            does not apply.
    """
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise DataError(f"--from {name}: there is no such layout. {hint}Known: {', '.join(FORMATS)}.")
    layout = FORMATS[name]
    if not options.path.exists():
        raise DataError(f"--from {name}: there is no file or folder {str(options.path)!r}.")
    if options.media is not None and not options.media.is_dir():
        raise DataError(f"--media {str(options.media)!r}: there is no such folder.")
    for option in options.given():
        if option not in layout.options:
            fitting = [one.name for one in FORMATS.values() if option in one.options]
            raise DataError(f"--{option} does not apply to --from {name}, but to {', '.join(fitting)}.")
    peek = Peek.of(options.path)
    if not layout.recognizes(peek):
        raise DataError(
            f"{str(options.path)!r} does not have the layout of --from {name}, {layout.what}. {_likely(peek)}"
        )
    return layout.open(options)


def _likely(peek: Peek) -> str:
    """Which option reads a file or folder, as far as its beginning shows."""
    fitting: Optional[SourceFormat] = next((one for one in FORMATS.values() if one.recognizes(peek)), None)
    if fitting:
        return f"It looks like --from {fitting.name}, {fitting.what}."
    if peek.has(".tar"):
        return f"It looks like WebDataset shards: use --index-only {peek.path}."
    if {"parts", "messages"} & peek.first.keys() or {"media", "text"} <= {*peek.first, *peek.header}:
        return f"It looks like a manifest: use --manifest {peek.path}."
    shown = ", ".join(sorted(peek.names)[:5] or list(peek.first)[:8] or list(peek.header)[:8])
    return f"It has {shown[:200]}." if shown else "It is empty."
