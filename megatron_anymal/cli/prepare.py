"""`anymal prepare`: build shards and their index from a manifest, or index existing shards, at once or in parts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

from megatron_anymal import lean_imports
from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.part_of import PartOf
from megatron_anymal.data.records import DataError

if TYPE_CHECKING:
    from megatron_anymal.data.index_builder import IndexOptions


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    part = PartOf.parse(arguments.part) if arguments.part else None
    _check(parser, arguments)
    # These import numpy and the media libraries' readers, which --help does without.
    from megatron_anymal.modalities import load_plugins

    if not arguments.plugin:
        # A plug-in may need torch; what this verb does itself, does not.
        lean_imports.hide_torch()
    if arguments.merge:
        from megatron_anymal.data.index_parts import merge_parts

        merge_parts(arguments.merge, arguments.max_bad_share)
        return 0
    load_plugins(arguments.plugin)
    if arguments.manifest:
        _prepare_manifest(arguments, _options(arguments), part)
    else:
        _index(arguments, arguments.index_only, _options(arguments), part, arguments.rebuild, None)
    return 0


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse options that are missing, or that would have no effect.

    Raises:
        DataError: naming the option.
    """
    given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
    # Option -> the options that it works with.
    users = {"out": "manifest", "overwrite": "manifest", "samples_per_shard": "manifest", "rebuild": "index_only"}
    for name, user in users.items():
        if name in given and user not in given:
            raise DataError(f"{_spelled(name)} has no effect without {_spelled(user)}. Leave it out.")
    if arguments.samples_per_shard < 1:
        raise DataError(f"--samples-per-shard {arguments.samples_per_shard} must be at least 1.")
    if arguments.merge:
        others = [_spelled(name) for name in given if name not in ("merge", "max_bad_share")]
        if others:
            raise DataError(f"--merge uses the options that its parts were made with. Leave out {', '.join(others)}.")
        return
    if not arguments.tokenizer:
        raise DataError("--tokenizer is missing: the index holds lengths in tokens. Name a tokenizer's folder.")
    if arguments.manifest and not arguments.out:
        raise DataError("--manifest needs --out, the folder to write shards into.")
    if arguments.part:
        for name, fix in (("max_bad_share", "Give it to --merge"), ("overwrite", "Empty the folder first")):
            if name in given:
                raise DataError(f"{_spelled(name)} applies to a whole folder, not to --part. {fix}.")


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _options(arguments: argparse.Namespace) -> IndexOptions:
    from megatron_anymal.data.index_builder import IndexOptions

    return IndexOptions(
        arguments.tokenizer,
        _kinds(arguments.modality),
        arguments.plugin,
        members=[p.strip().lower().lstrip(".") for text in arguments.members for p in text.split(",")],
        attributes=_attributes(arguments.attribute),
        limits=_limits(arguments.limit),
        text_only=arguments.text_only,
    )


def _prepare_manifest(arguments: argparse.Namespace, options: IndexOptions, part: Optional[PartOf]) -> None:
    """Write the shards of a manifest, or a part of them, and index them."""
    from megatron_anymal.data.manifest import existing, write_shards
    from megatron_anymal.data.manifest_parts import write_part
    from megatron_anymal.data.tokenizer import Tokenizer

    manifest, out, size = arguments.manifest, arguments.out, arguments.samples_per_shard
    existing(manifest)
    # Before the shards are written: the same command can then be started again.
    Tokenizer(arguments.tokenizer)
    if part:
        names = write_part(manifest, out, part, size, options.limits)
        _index(arguments, out, options, part, True, names)
    else:
        write_shards(manifest, out, size, arguments.overwrite, options.limits)
        _index(arguments, out, options, None, True, None)


def _index(
    arguments: argparse.Namespace,
    folder: str,
    options: IndexOptions,
    part: Optional[PartOf],
    rebuild: bool,
    names: Optional[Sequence[str]],
) -> None:
    from megatron_anymal.data.index_folder import make_index
    from megatron_anymal.data.index_parts import index_part

    if part:
        index_part(folder, options, part, arguments.workers, rebuild, names)
    else:
        make_index(folder, options, arguments.workers, arguments.max_bad_share, rebuild)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymal prepare", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", help="a .jsonl or .csv file of media paths and texts to pack into shards")
    source.add_argument("--index-only", metavar="FOLDER", help="a folder of WebDataset shards to index in place")
    source.add_argument("--merge", metavar="FOLDER", help="a folder whose parts are finished: write its index")
    parser.add_argument("--out", help="with --manifest: the folder to create")
    parser.add_argument("--tokenizer", help="folder of the tokenizer that training will use")
    parser.add_argument("--samples-per-shard", type=int, default=2000)
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of --out")
    parser.add_argument("--part", metavar="K/N", help="do the K-th of N parts, for example 3/64; see --merge")
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="with --index-only: read all shards, also those that the folder's index has unchanged",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="most processes that index shards; a small folder is indexed by fewer (default: the number of cores)",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.01,
        help="stop above this share of samples left out, or of unreadable bytes (default 0.01)",
    )
    parser.add_argument(
        "--members",
        action="append",
        default=[],
        metavar="ENDINGS",
        help="use only members with these endings, for example jpg,txt or '*.png,json', and ignore others",
    )
    parser.add_argument(
        "--text-only",
        action="store_true",
        help="keep samples of a .txt alone in a folder that also has samples with media",
    )
    parser.add_argument("--modality", action="append", default=[], metavar="ENDING=KIND", help="for example npy=imu")
    parser.add_argument(
        "--attribute",
        action="append",
        default=[],
        metavar="KIND.NAME=VALUE",
        help="default for all media of a kind that do not specify it, for example imu.rate=200",
    )
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="override one of data.limits, for example max_pixels=20000000",
    )
    parser.add_argument("--plugin", action="append", default=[], help="a file that registers further modalities")
    return parser


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise DataError(f"{option} {text!r} is not of the form {form}.")
    return name, value


def _kinds(given: Sequence[str]) -> dict[str, str]:
    pairs = (_pair("--modality", text, "ENDING=KIND, for example npy=imu") for text in given)
    return {ending.lower().lstrip("."): kind for ending, kind in pairs}


def _attributes(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse KIND.NAME=VALUE pairs, grouped by kind; values are parsed as JSON if possible."""
    from megatron_anymal.modalities import MODALITIES
    from megatron_anymal.modalities.base import nearest

    by_kind: dict[str, dict[str, Any]] = {}
    for text in given:
        path, value = _pair("--attribute", text, "KIND.NAME=VALUE, for example imu.rate=200")
        kind, _, name = path.partition(".")
        if not name:
            raise DataError(f"--attribute {text!r} is not of the form KIND.NAME=VALUE, for example imu.rate=200.")
        if kind not in MODALITIES:
            raise DataError(f"--attribute {text!r}: there is no modality {kind!r}. {nearest(kind, MODALITIES)}")
        try:
            by_kind.setdefault(kind, {})[name] = json.loads(value)
        except ValueError:
            by_kind.setdefault(kind, {})[name] = value
    return by_kind


def _limits(given: Sequence[str]) -> LimitsConfig:
    """Return the default limits with the given ones replaced."""
    from megatron_anymal.modalities.base import nearest

    limits = LimitsConfig()
    known = {field.name: type(getattr(limits, field.name)) for field in dataclasses.fields(limits)}
    values = {}
    for text in given:
        name, value = _pair("--limit", text, "NAME=NUMBER, for example max_pixels=20000000")
        if name not in known:
            raise DataError(f"--limit {text!r}: there is no limit {name!r}. {nearest(name, known)}")
        try:
            values[name] = known[name](value)
        except ValueError:
            raise DataError(f"--limit {text!r}: {value!r} is not a number of type {known[name].__name__}.") from None
        if values[name] < 1:
            raise DataError(f"--limit {text!r} must be at least 1.")
    return dataclasses.replace(limits, **values)
