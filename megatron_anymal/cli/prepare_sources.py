"""The options of `anymal prepare` that name what to prepare, which of them go together, and the packing of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from megatron_anymal.config import LimitsConfig, is_remote
from megatron_anymal.data.manifest import ManifestSource
from megatron_anymal.data.part_of import PartOf
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_writer import pack
from megatron_anymal.data.source_records import Source
from megatron_anymal.data.sources.registry import FORMATS, open_source
from megatron_anymal.data.sources.source_format import CAPTION_CHOICES, ShardFolder, SourceOptions

if TYPE_CHECKING:
    from megatron_anymal.data.index_builder import IndexOptions


# Option -> the ones of which it needs one.
_USERS = {
    "out": ("manifest", "source"),
    "overwrite": ("manifest", "source"),
    "encode": ("manifest", "source"),
    "samples_per_shard": ("manifest", "source"),
    "rebuild": ("index_only", "source"),
}
_SPELLED = {"source": "--from"}


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
    source.add_argument("--merge", metavar="FOLDER", help="a folder whose parts are finished: write its index")
    parser.add_argument("--out", help="with --manifest and --from: the folder to create")
    parser.add_argument("--media", type=Path, metavar="FOLDER", help="with --from: folder of the media files")
    parser.add_argument(
        "--captions",
        choices=CAPTION_CHOICES,
        help="with --from coco or clotho: which captions to use per media item (default: each)",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="with --from huggingface or sharegpt: the column for a role, for example image=picture or text=caption",
    )
    parser.add_argument("--split", help="with --from energon (default: train) or huggingface: split to read")
    parser.add_argument("--narrations", type=Path, metavar="FILE", help="with --from ego4d-imu: file of the texts")
    parser.add_argument(
        "--window",
        type=float,
        metavar="SECONDS",
        help="with --from ego4d-imu: length of the signal around a narration (default: 5)",
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="RULE",
        help="leave out samples, for example min_side=224, max_aspect=2, max_seconds=15, min_column:similarity=0.28, "
        "integrity=FILE",
    )
    parser.add_argument(
        "--encode",
        action="append",
        default=[],
        metavar="NAME=TOKENIZER",
        help="store media of this modality as codes for model.discrete.NAME; TOKENIZER is a HuggingFace folder with a "
        "codebook, or module:Class",
    )


def refuse_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse options that are missing, or that would have no effect.

    Raises:
        DataError: naming the option.
    """
    given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
    if arguments.samples_per_shard < 1:
        raise DataError(f"--samples-per-shard {arguments.samples_per_shard} must be at least 1.")
    if arguments.merge:
        others = [_spelled(name) for name in given if name not in ("merge", "max_bad_share")]
        if others:
            raise DataError(f"--merge uses the options that its parts were made with. Leave out {', '.join(others)}.")
        return
    for name, users in _USERS.items():
        if name in given and not set(users) & set(given):
            fitting = " or ".join(map(_spelled, users))
            raise DataError(f"{_spelled(name)} has no effect without {fitting}. Leave it out.")
    if not arguments.tokenizer:
        raise DataError("--tokenizer is missing: the index holds lengths in tokens. Name a tokenizer's folder.")
    if arguments.part:
        for name, fix in (("max_bad_share", "Give it to --merge"), ("overwrite", "Empty the folder first")):
            if name in given:
                raise DataError(f"{_spelled(name)} applies to a whole folder, not to --part. {fix}.")


def refuse_addresses(arguments: argparse.Namespace) -> None:
    """Refuse addresses that cannot be written, or of which a list of samples cannot be read.

    Raises:
        DataError: naming the option.
    """
    if is_remote(arguments.out or ""):
        raise DataError(
            f"--out {arguments.out}: shards are written to a local folder. Upload it with its index afterwards."
        )
    if arguments.source and is_remote(arguments.source[1]):
        layout, path = arguments.source
        raise DataError(
            f"--from {layout} {path}: data sets are read from a local folder. Download it; WebDataset shards are "
            "indexed where they are by --index-only."
        )
    for name in ("index_only", "merge"):
        folder = getattr(arguments, name) or ""
        if folder.startswith(("http://", "https://")):
            raise DataError(
                f"{_spelled(name)} {folder}: nothing can be written through an HTTP server. Build the index where the "
                "shards are stored, and serve both."
            )


def _spelled(name: str) -> str:
    return _SPELLED.get(name, f"--{name.replace('_', '-')}")


def opened(arguments: argparse.Namespace, limits: LimitsConfig) -> Union[Source, ShardFolder]:
    """The source or the shards that the arguments name.

    Raises:
        DataError: it does not exist or has another layout, or an option is missing or does not apply.
    """
    if not arguments.source:
        _refuse_options_of_sources(arguments)
    if arguments.encode:
        from megatron_anymal.data.media_tokenizers import specifications

        specifications(arguments.encode)
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


def packed(
    source: Source, arguments: argparse.Namespace, options: IndexOptions, part: Optional[PartOf]
) -> Optional[list[str]]:
    """Pack a source into --out, without the samples that a filter excludes.

    Returns:
        File names of the shards of a part; None without parts.

    Raises:
        DataError: see `shard_writer.pack` and `manifest_parts.write_part`.
    """
    depends: dict[str, Any] = {
        "filters": [rule.identity for rule in options.filters],
        "kinds": dict(options.kinds),
        "attributes": {kind: dict(values) for kind, values in options.attributes.items()},
        "plugins": list(options.plugins),
    }
    encoder = None
    if arguments.encode:
        # It imports torch and transformers.
        from megatron_anymal.data.media_encoding import MediaEncoder
        from megatron_anymal.data.media_tokenizers import open_tokenizer, specifications

        named = specifications(arguments.encode)
        encoder = MediaEncoder({name: open_tokenizer(name, spec) for name, spec in named.items()}, options)
        depends["encode"] = encoder.identity
    out, size, share = arguments.out, arguments.samples_per_shard, arguments.max_bad_share
    used = depends if options.filters or encoder else {}
    filtering = (options if options.filters else None, used, encoder)
    if part:
        # It imports numpy, which refusals do without.
        from megatron_anymal.data.manifest_parts import write_part

        return write_part(source, out, part, size, options.limits, *filtering)
    pack(source, out, size, arguments.overwrite, share, options.limits, *filtering)
    return None


def _check_out(arguments: argparse.Namespace, source: Union[Source, ShardFolder]) -> None:
    option = "--manifest" if arguments.manifest else f"--from {arguments.source[0]}"
    if isinstance(source, Source) and not arguments.out:
        raise DataError(f"{option} needs --out, the folder to write shards into.")
    if isinstance(source, ShardFolder):
        for name, given in (("out", arguments.out), ("overwrite", arguments.overwrite), ("encode", arguments.encode)):
            if given:
                where = f"in place, in {source.folder}/index, without a copy"
                raise DataError(f"{option} is indexed {where}. Remove --{name}.")
    elif arguments.rebuild:
        raise DataError(f"--rebuild has no effect without --index-only: {option} is packed. Leave it out.")


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
