"""`anymal prepare`: build shards and their index from a manifest or a data set, or index existing shards; at once or in
parts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Optional, Union

from megatron_anymal import lean_imports
from megatron_anymal.cli.prepare_sources import add_arguments, opened, packed, refuse_addresses, refuse_options
from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.filters import ContentCheck, Rule, parse_rules
from megatron_anymal.data.part_of import PartOf
from megatron_anymal.data.records import DataError
from megatron_anymal.data.source_records import Source
from megatron_anymal.data.sources.source_format import ShardFolder

if TYPE_CHECKING:
    from megatron_anymal.data.index_builder import IndexOptions


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    part = PartOf.parse(arguments.part) if arguments.part else None
    refuse_options(parser, arguments)
    refuse_addresses(arguments)
    limits = _limits(arguments.limit)
    filters = parse_rules(arguments.filter, partial(_open_integrity, limits))
    source = None if arguments.merge else opened(arguments, limits)
    # These import numpy and the media libraries' readers, which --help does without.
    from megatron_anymal.modalities import load_plugins

    if not (arguments.plugin or arguments.encode or any(rule.check for rule in filters)):
        # A plug-in, a tokenizer of media and classifiers may need torch; what this verb does itself, does not.
        lean_imports.hide_torch()
    if source is None:
        from megatron_anymal.data.index_parts import merge_parts

        merge_parts(arguments.merge, arguments.max_bad_share)
        return 0
    load_plugins(arguments.plugin)
    if any(rule.check for rule in filters):
        # Each further process would load the classifiers again.
        arguments.workers = 1
    _prepare(arguments, source, _options(arguments, limits, filters), part)
    for rule in filters:
        if rule.check:
            print(rule.check.summary(), file=sys.stderr)
    return 0


def _open_integrity(limits: LimitsConfig, path: str) -> ContentCheck:
    """Read an integrity file of --filter; classifiers are loaded when the first sample needs them."""
    from megatron_anymal.integrity.sample_filter import SampleFilter

    return SampleFilter(path, limits)


def _prepare(
    arguments: argparse.Namespace, source: Union[Source, ShardFolder], options: IndexOptions, part: Optional[PartOf]
) -> None:
    """Pack a source, or a part of it, and index the shards; or index existing ones."""
    if isinstance(source, ShardFolder):
        options = dataclasses.replace(options, members=options.members or list(source.members))
        _index(arguments, source.folder, options, part, arguments.rebuild, None)
        print("".join(f"{remark}\n" for remark in source.remarks), end="")
        return
    from megatron_anymal.data.tokenizer import Tokenizer

    # Before the shards are written: the same command can then be started again.
    Tokenizer(arguments.tokenizer)
    names = packed(source, arguments, options, part)
    # Excluded samples are not in the shards.
    _index(arguments, arguments.out, dataclasses.replace(options, filters=()), part, True, names)


def _options(arguments: argparse.Namespace, limits: LimitsConfig, filters: Sequence[Rule]) -> IndexOptions:
    from megatron_anymal.data.index_builder import IndexOptions

    return IndexOptions(
        arguments.tokenizer,
        _kinds(arguments.modality),
        arguments.plugin,
        members=[p.strip().lower().lstrip(".") for text in arguments.members for p in text.split(",")],
        attributes=_attributes(arguments.attribute),
        limits=limits,
        text_only=arguments.text_only,
        filters=filters,
    )


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
    add_arguments(parser)
    parser.add_argument("--tokenizer", help="folder of the tokenizer that training will use")
    parser.add_argument("--samples-per-shard", type=int, default=2000)
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of --out")
    parser.add_argument("--part", metavar="K/N", help="do the K-th of N parts, for example 3/64; see --merge")
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="with shards that are indexed in place: read all shards again, even those that have not changed",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="maximum number of indexing processes; a small folder is indexed by fewer (default: the number of cores)",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.01,
        help="stop above this share of samples left out, or of unreadable bytes (default: 0.01)",
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
        help="keep samples that consist of a .txt alone, in a folder that also has samples with media",
    )
    parser.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="ENDING=KIND",
        help="kind of media in members with this ending, for example npy=imu",
    )
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
    from megatron_anymal.data.codes import HASH_ATTRIBUTE
    from megatron_anymal.modalities import MODALITIES
    from megatron_anymal.modalities.base import nearest

    by_kind: dict[str, dict[str, Any]] = {}
    for text in given:
        path, value = _pair("--attribute", text, "KIND.NAME=VALUE, for example imu.rate=200")
        kind, _, name = path.partition(".")
        if not name:
            raise DataError(f"--attribute {text!r} is not of the form KIND.NAME=VALUE, for example imu.rate=200.")
        # Names in model.discrete are not known here.
        if kind not in MODALITIES and name != HASH_ATTRIBUTE:
            raise DataError(f"--attribute {text!r}: there is no modality {kind!r}. {nearest(kind, MODALITIES)}")
        try:
            by_kind.setdefault(kind, {})[name] = json.loads(value)
        except ValueError:
            by_kind.setdefault(kind, {})[name] = value
    return by_kind


def _limits(given: Sequence[str]) -> LimitsConfig:
    """Return the default limits with the given ones replaced."""
    limits = LimitsConfig()
    known = {field.name: type(getattr(limits, field.name)) for field in dataclasses.fields(limits)}
    values = {}
    for text in given:
        name, value = _pair("--limit", text, "NAME=NUMBER, for example max_pixels=20000000")
        if name not in known:
            from megatron_anymal.modalities.base import nearest

            raise DataError(f"--limit {text!r}: there is no limit {name!r}. {nearest(name, known)}")
        try:
            values[name] = known[name](value)
        except ValueError:
            raise DataError(f"--limit {text!r}: {value!r} is not a number of type {known[name].__name__}.") from None
        if values[name] < 1:
            raise DataError(f"--limit {text!r} must be at least 1.")
    return dataclasses.replace(limits, **values)
