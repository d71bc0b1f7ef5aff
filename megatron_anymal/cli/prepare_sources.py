"""The options of `anymal prepare` that name what to prepare, and the packing of it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.manifest import ManifestSource
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_writer import pack
from megatron_anymal.data.source_records import Source
from megatron_anymal.data.sources.registry import FORMATS, open_source
from megatron_anymal.data.sources.source_format import CAPTION_CHOICES, ShardFolder, SourceOptions

if TYPE_CHECKING:
    from megatron_anymal.data.index_builder import IndexOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", help="a .jsonl or .csv file of media paths and texts to pack into shards")
    source.add_argument("--index-only", metavar="FOLDER", help="a folder of WebDataset shards to index in place")
    source.add_argument(
        "--from",
        dest="source",
        nargs=2,
        metavar=("LAYOUT", "PATH"),
        help=f"a data set as its makers publish it; LAYOUT is one of {', '.join(FORMATS)}",
    )
    parser.add_argument("--out", help="with --manifest and --from: the folder to create")
    parser.add_argument("--media", type=Path, metavar="FOLDER", help="with --from: folder of the media files")
    parser.add_argument(
        "--captions", choices=CAPTION_CHOICES, help="with --from coco or clotho: which captions of a medium (each)"
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="with --from huggingface or sharegpt: for example image=picture or text=caption",
    )
    parser.add_argument("--split", help="with --from energon (train) or huggingface: which split")
    parser.add_argument("--narrations", type=Path, metavar="FILE", help="with --from ego4d-imu: the texts")
    parser.add_argument(
        "--window", type=float, metavar="SECONDS", help="with --from ego4d-imu: length around a narration (5)"
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="RULE",
        help="leave out samples, for example min_side=224, max_aspect=2, max_seconds=15, min_column:similarity=0.28",
    )


def opened(arguments: argparse.Namespace, limits: LimitsConfig) -> Union[Source, ShardFolder]:
    """The source or the shards that the arguments name.

    Raises:
        DataError: it does not exist or has another layout, or an option is missing or does not apply.
    """
    if not arguments.source:
        _refuse_options_of_sources(arguments)
    if arguments.index_only:
        return ShardFolder(arguments.index_only)
    if arguments.manifest:
        source: Union[Source, ShardFolder] = ManifestSource(arguments.manifest, limits)
    else:
        layout, path = arguments.source
        options = SourceOptions(
            Path(path),
            arguments.media,
            arguments.captions,
            _columns(arguments.column),
            arguments.split,
            arguments.narrations,
            arguments.window,
            limits,
        )
        source = open_source(layout, options)
    _check_out(arguments, source)
    return source


def packed(source: Source, arguments: argparse.Namespace, options: IndexOptions) -> IndexOptions:
    """Pack a source into --out; returns the options for indexing it, which need no filters any more.

    Raises:
        DataError: see `shard_writer.pack`.
    """
    depends: dict[str, Any] = {
        "filters": [rule.text for rule in options.filters],
        "kinds": dict(options.kinds),
        "attributes": {kind: dict(values) for kind, values in options.attributes.items()},
        "plugins": list(options.plugins),
    }
    pack(
        source,
        arguments.out,
        arguments.samples_per_shard,
        arguments.overwrite,
        arguments.max_bad_share,
        options.limits,
        options.apply_filters if options.filters else None,
        depends if options.filters else {},
    )
    return dataclasses.replace(options, filters=())


def _check_out(arguments: argparse.Namespace, source: Union[Source, ShardFolder]) -> None:
    option = "--manifest" if arguments.manifest else f"--from {arguments.source[0]}"
    if isinstance(source, Source) and not arguments.out:
        raise DataError(f"{option} needs --out, the folder to write shards into.")
    if isinstance(source, ShardFolder) and arguments.out:
        raise DataError(f"{option} is indexed in place, in {source.folder}/index, without a copy. Remove --out.")


def _refuse_options_of_sources(arguments: argparse.Namespace) -> None:
    for name in ("media", "captions", "column", "split", "narrations", "window"):
        if getattr(arguments, name) not in (None, []):
            raise DataError(f"--{name} applies only to --from.")


def _columns(given: Sequence[str]) -> dict[str, str]:
    columns = {}
    for text in given:
        role, _, name = text.partition("=")
        if not role or not name:
            raise DataError(f"--column {text!r} is not of the form ROLE=NAME, for example image=picture.")
        columns[role] = name
    return columns
