"""The work of `anymal inspect`: checks prepared folders and shows their samples."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Optional

import numpy as np

from megatron_anymal.cli.data_page.markup import file_size
from megatron_anymal.cli.data_page.numbers import MEASURED_STEPS, fill, row_chunks
from megatron_anymal.config import AlignmentConfig, DatasetConfig, ModelConfig, RunConfig, StageConfig
from megatron_anymal.data.codes import CodeLayout, CodesKind, plan_kinds
from megatron_anymal.data.configured_modality import LoadedModality, PlannedModality
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.left_out import grouped
from megatron_anymal.data.lint import (
    Reading,
    ReadSample,
    kind_name,
    read_all,
    read_sample,
    size_names,
    wrong_shards,
    wrong_tokenizer,
)
from megatron_anymal.data.mix_stages import stage_lines
from megatron_anymal.data.planner import BatchLayout, BatchPlanner
from megatron_anymal.data.records import CodesPart, DataError, MediaPart, Part
from megatron_anymal.data.shard_index import MediaBytes, ShardIndex
from megatron_anymal.data.shared_prompts import shares_prompts
from megatron_anymal.data.tokenizer import Document, Tokenizer
from megatron_anymal.lean_imports import hide_torch
from megatron_anymal.modalities import MODALITIES, MediaError, build_modality, load_plugins

# Number of bad samples that are named; the others are only counted.
_SHOWN = 20
_SCALE = 40
_KIND_NAMES = {"messages": "conversations", "preference": "preference pairs"}


@dataclass(frozen=True)
class InspectedRun:
    """A configuration, and what is built from it to inspect samples."""

    config: RunConfig
    reading: Reading
    modalities: list[PlannedModality]


def inspect(arguments: argparse.Namespace, folders: Sequence[str], tokenizer: str, config: Optional[RunConfig]) -> int:
    """Inspect prepared folders as the verb's arguments say, print the results, and return 1 if anything is bad.

    Args:
        tokenizer: the tokenizer's folder.
        config: a run that has checked its configuration.

    Raises:
        DataError: a folder has no index, or its shards or tokenizer cannot be used.
        ConfigError: a plug-in cannot be imported.
    """
    load_plugins([*arguments.plugin, *(config.model.plugins if config else ())])
    limits, storage = (config.data.limits, config.data.storage) if config else (None, None)
    indexes = [ShardIndex(folder, limits, storage) for folder in folders]
    kinds = set().union(*(index.kinds_used() for index in indexes))
    kinds |= {section.kind or name for name, section in config.model.modalities.items()} if config else set()
    media = [kind for kind in kinds if not CodesKind.parse(kind)]
    if all(kind in MODALITIES and not MODALITIES[kind].needs_torch for kind in media):
        hide_torch()
    run = build_run(config) if config else None
    problems = sum(_inspect(index, tokenizer, run, arguments) for index in indexes)
    if run and not arguments.sample:
        problems += _packing(run)
    return 1 if problems else 0


def build_run(config: RunConfig) -> InspectedRun:
    """Build what a checked configuration needs to plan and read its data.

    Raises:
        ConfigError, DataError: a modality or the tokenizer cannot be used.
    """
    tokenizer = Tokenizer(config.data.tokenizer)
    planned, loaded = [], {}
    for section, options in config.model.modalities.items():
        kind, modality = options.kind or section, build_modality(section, options, config.data.limits)
        tokens, cost = options.projector.num_tokens, options.cost_per_piece or None
        planned.append(PlannedModality(section, kind, modality, tokens, cost))
        placeholder = tokenizer.placeholder(options.placeholder, f"model.modalities.{section}.placeholder")
        loaded[kind] = LoadedModality(modality, options.projector.num_tokens, placeholder)
    codes = _code_layout(config.model) if config.model.discrete else None
    return InspectedRun(config, Reading(tokenizer, {k: e.modality for k, e in loaded.items()}, loaded, codes), planned)


def _code_layout(model: ModelConfig) -> CodeLayout:
    """The ids of a run's marks and codes, which follow the Llama's vocabulary."""
    section = model.language_model
    if section.checkpoint:
        from megatron_anymal.checkpoint.frozen_base import resolve_language_model

        vocab_size = resolve_language_model(section)[1].vocab_size
    else:
        from megatron_anymal.model.llama_shape import read_llama_config

        vocab_size = read_llama_config(section).vocab_size
    return CodeLayout(DiscreteVocabulary(vocab_size, model.discrete), model.discrete)


def _inspect(
    index: ShardIndex, tokenizer_folder: str, run: Optional[InspectedRun], arguments: argparse.Namespace
) -> int:
    """Check one folder, or show samples of it, and return the number of problems."""
    tokenizer = (
        run.reading.tokenizer if run and run.config.data.tokenizer == tokenizer_folder else Tokenizer(tokenizer_folder)
    )
    kinds = sorted(index.kinds_used())
    if run:
        _refuse_unread(index, run)
        reading = dataclasses.replace(run.reading, tokenizer=tokenizer)
    else:
        reading = Reading.without_configuration(tokenizer, index)
    wrong = [*wrong_shards(index), *wrong_tokenizer(index, tokenizer, tokenizer_folder)]
    _print_header(index, wrong)
    if arguments.sample:
        return len(wrong) + sum(_show(index, text, reading) for text in arguments.sample)
    _print_media(index)
    _print_left_out(index)
    _print_lengths("text tokens per sample", _text_tokens(index))
    if wrong_tokenizer(index, tokenizer, tokenizer_folder):
        # Every sample would be reported as bad: its lengths are those of another tokenizer.
        return len(wrong)
    numbers = range(min(len(index), arguments.limit or len(index)))
    if not run:
        only_probed = [kind for kind in kinds if kind not in reading.modalities and not CodesKind.parse(kind)]
        if only_probed:
            print(f"not decoded without --config-name, only probed: {', '.join(only_probed)}")
    bad = read_all(index, numbers, reading, arguments.workers)
    for key, why in bad[:_SHOWN]:
        print(f"bad: {key}: {why}")
    if len(bad) > _SHOWN:
        print(f"bad: {len(bad) - _SHOWN} more")
    print(f"read {len(numbers)} of {len(index)} samples with their media: {len(bad) or 'none'} bad")
    return len(wrong) + len(bad)


def _refuse_unread(index: ShardIndex, run: InspectedRun) -> None:
    codes = plan_kinds(index.kinds_used(), run.config.model.discrete, repr(index.folder))
    missing = index.kinds_used() - set(codes) - set(run.reading.modalities)
    if missing:
        raise DataError(
            f"{index.folder!r} holds {', '.join(sorted(missing))}, for which the configuration has no modality. Add "
            f"model.modalities.{min(missing)}."
        )


def _print_header(index: ShardIndex, wrong: Sequence[str]) -> None:
    size = sum(index.header.shard_bytes)
    counts = f"{len(index)} samples, {len(index.media)} media items, {len(index.header.shards)} shards"
    kinds = ", ".join(f"{_KIND_NAMES[kind]} {count}" for kind, count in index.sample_kinds().items() if kind != "parts")
    print(f"{index.folder}: {counts}, {file_size(size)}" + (f" ({kinds})" if kinds else ""))
    for problem in wrong:
        print(f"bad: {problem}")


def _print_media(index: ShardIndex) -> None:
    for number, kind in enumerate(index.header.kinds):
        rows = index.media[index.media["kind"] == number]
        if len(rows):
            names = size_names(kind)
            sizes = ", ".join(f"{name} {_spread(rows['size'][:, at])}" for at, name in enumerate(names))
            size = f"bytes {_spread(rows['length'])}"
            print(f"  {kind_name(kind)}: {len(rows)} items, {sizes}, {size}  (min / median / max)")


def _print_left_out(index: ShardIndex) -> None:
    """Print what was left out of the index, grouped by reason."""
    ignored = index.members.get("ignored", {})
    if ignored:
        print(f"  ignored members: {', '.join(f'{what} {count}' for what, count in ignored.items())}")
    for line in grouped(index.left_out()):
        print(f"  left out: {line}" if not line.startswith(" ") else f"  {line}")


def _spread(values: np.ndarray) -> str:
    return " / ".join(f"{v:.6g}" for v in (values.min(), np.median(values), values.max()))


def _print_lengths(what: str, lengths: np.ndarray) -> None:
    """Print the spread and a histogram of whole numbers."""
    low, high = int(lengths.min()), int(lengths.max())
    print(f"{what}: min {low}, median {np.median(lengths):g}, p95 {np.percentile(lengths, 95):g}, max {high}")
    step = max(1, -(-(high - low + 1) // 10))
    edges = np.arange(low, high + step + 1, step)
    counts, _ = np.histogram(lengths, edges)
    width = len(str(high + step))
    for start, count in zip(edges, counts):
        bar = "#" * -(-_SCALE * int(count) // int(counts.max()))
        span = f"{start:>{width}}" + (f"-{start + step - 1:<{width}}" if step > 1 else "")
        print(f"  {span}  {bar:<{_SCALE}} {count}".rstrip())


def find_sample(index: ShardIndex, text: str) -> int:
    """Find a sample's row by its key or, if no key matches, by its number.

    Raises:
        DataError: there is none.
    """
    for number in range(len(index)):
        if index.key(number) == text:
            return number
    if text.isdigit() and int(text) < len(index):
        return int(text)
    raise DataError(
        f"--sample {text}: {index.folder!r} has no sample with this key or number (it has {len(index)} samples)."
    )


def _show(index: ShardIndex, text: str, reading: Reading) -> int:
    """Print a sample; return 1 if it is bad."""
    number = find_sample(index, text)
    print(f"\nsample {index.key(number)!r}, number {number}")
    try:
        sample = read_sample(index, number, reading)
    except (DataError, MediaError) as error:
        print(f"bad: {error}")
        return 1
    documents = list(zip(sample.sample.documents, sample.documents, sample.sample.item_numbers()))
    for name, (parts, document, numbers) in zip(("chosen", "rejected"), documents):
        if len(documents) > 1:
            print(f"  {name}:")
        _print_parts(parts, numbers, index.media_rows(number), sample)
        which = "" if reading.loaded else " without media"
        print(f"  {len(document.tokens)} tokens{which}, {sum(document.is_target)} targets:")
        for line in _token_lines(document, sample.media, reading):
            print(f"    {line}")
    return 0


def _print_parts(parts: Sequence[Part], numbers: Sequence[int], media_rows: np.ndarray, sample: ReadSample) -> None:
    """Print one line per content part of a document, whose media have these numbers."""
    rows = ((media_rows[n], sample.media[n], sample.pieces[n]) for n in numbers)
    for part in parts:
        if not isinstance(part, MediaPart):
            print(f"  text   {'target' if part.loss else '      '}  {part.text!r}")
            continue
        row, item, pieces = next(rows)
        sizes = ", ".join(f"{name} {value:.6g}" for name, value in zip(size_names(part.modality), row["size"]))
        cut = f", {pieces} piece(s)" if pieces else ""
        given = "".join(f", {key}={value}" for key, value in part.attributes.items())
        target = "target " if isinstance(part, CodesPart) and part.loss else ""
        name = f"{target}{kind_name(part.modality)} {part.media!r}"
        print(f"  media  {name}: {sizes}{given}, {file_size(len(item.data))}{cut}")


def _token_lines(document: Document, media: Sequence[MediaBytes], reading: Reading) -> Iterator[str]:
    """Yield one line per token or run of placeholders: position, id, text, and whether it is a target."""
    hf = reading.tokenizer.hf
    starts = {} if reading.loaded else _media_at(document, media)
    placeholders = {entry.placeholder for entry in reading.loaded.values()}
    position = 0
    for token, count in _runs(document.tokens, reading):
        if reading.codes and token >= reading.codes.vocabulary.base_size:
            target = "  target" if document.is_target[position] else ""
            name = reading.codes.vocabulary.lookup(token).name
            yield f"{position:>5}  {token:>6}  {name}: {count - 2} codes between its marks{target}"
            position += count
            continue
        if token in placeholders:
            yield f"{position:>5}  {token:>6}  {hf.convert_ids_to_tokens(token)} x {count}"
            position += count
            continue
        for _ in range(count):
            yield from starts.get(position, [])
            target = "  target" if document.is_target[position] else ""
            yield f"{position:>5}  {token:>6}  {hf.decode([token])!r}{target}"
            position += 1


def _runs(tokens: Sequence[int], reading: Reading) -> Iterator[tuple[int, int]]:
    """First token and length of each item of codes with its marks, and of each run of equal tokens between them."""
    vocabulary = reading.codes.vocabulary if reading.codes else None
    ends = {vocabulary.begin(name): vocabulary.end(name) for name in vocabulary.names} if vocabulary else {}
    start = 0
    while start < len(tokens):
        token, stop = tokens[start], start + 1
        if token in ends:
            stop = tokens.index(ends[token], start) + 1
        else:
            while stop < len(tokens) and tokens[stop] == token:
                stop += 1
        yield token, stop - start
        start = stop


def _media_at(document: Document, media: Sequence[MediaBytes]) -> dict[int, list[str]]:
    """Text-token position -> lines that mark the media at that position."""
    at: dict[int, list[str]] = {}
    for start, item in zip(document.media_starts, media):
        at.setdefault(start, []).append(f"{'':>5}  {'':>6}  <{item.part.modality}>")
    return at


def _packing(run: InspectedRun) -> int:
    """Print how many samples of each dataset are too long, and how well the packs of the first steps are filled."""
    config, problems = run.config, 0
    for split in ("train", "validation"):
        for name, dataset in getattr(config.data, split).items():
            lengths = _lengths(planner_of(run, {name: dataset}))
            _print_lengths(f"data.{split}.{name}: LLM tokens per sample, including media", lengths)
            too_long = int((lengths > config.data.seq_length).sum())
            fate = "training refuses to start" if config.data.too_long == "refuse" else "they are left out"
            note = f" ({fate}: data.too_long={config.data.too_long})" if too_long else ""
            bad = "bad: " if too_long and config.data.too_long == "refuse" else ""
            print(f"{bad}longer than data.seq_length={config.data.seq_length}: {too_long} of {len(lengths)}{note}")
            problems += bool(bad)
    planner = planner_of(run, config.data.train, config.data.schedule, config.model.multiplex)
    last = config.trainer.max_steps
    lines = stage_lines(config.data.train, config.data.schedule, last, planner.stages)
    for number in range(len(planner.stages)):
        if lines:
            print(lines[number])
        _print_fill(planner, planner.steps_of(number, last)[:MEASURED_STEPS])
    return problems


def _print_fill(planner: BatchPlanner, steps: range) -> None:
    fills, packs = [], []
    for step in steps:
        plan = planner.plan(step)
        fills.append(fill(plan))
        packs.append(sum(len(replica) for replica in plan.micro_batches))
    print(
        f"first {len(fills)} steps: {np.mean(fills):.1%} of the computed tokens are real (worst step "
        f"{min(fills):.1%}), {min(packs)} to {max(packs)} micro-batches per step"
    )


def planner_of(
    run: InspectedRun,
    datasets: dict[str, DatasetConfig],
    schedule: Sequence[StageConfig] = (),
    alignments: Mapping[str, AlignmentConfig] = MappingProxyType({}),
) -> BatchPlanner:
    """The run's planner for some datasets; samples that are too long are dropped, not refused.

    Args:
        schedule: `data.schedule`, if these are all datasets of `data.train`.
        alignments: `model.multiplex`, likewise.

    Raises:
        DataError: see BatchPlanner.
    """
    config, tokenizer = run.config, run.reading.tokenizer
    return BatchPlanner(
        datasets,
        run.modalities,
        tokenizer,
        _batch_layout(config),
        global_batch_size=config.model.samples_per_step,
        seed=config.model.seed,
        # Counted here, not rejected.
        too_long="drop",
        check_shards=False,
        storage=config.data.storage,
        limits=config.data.limits,
        discrete=config.model.discrete,
        schedule=schedule,
        alignments=alignments,
    )


def _batch_layout(config: RunConfig) -> BatchLayout:
    """What affects packing, if the run uses Transformer Engine wherever it is installed. Imports no torch."""
    engine = config.model.transformer_impl != "local" and importlib.util.find_spec("transformer_engine")
    shared = shares_prompts(config.job, config.model, "transformer_engine" if engine else "sdpa")
    return BatchLayout.of(config.model, config.data.seq_length, config.data_parallel_size, shared_prompts=shared)


def _lengths(planner: BatchPlanner) -> np.ndarray:
    """Number of LLM tokens of every sample, for a planner of one dataset."""
    [index] = planner.indexes
    return np.concatenate([planner.measure(index, rows).length for rows in row_chunks(index)])


def _text_tokens(index: ShardIndex) -> np.ndarray:
    """Number of text tokens of every sample."""
    return np.concatenate([index.lengths(rows)[0].sum(axis=1) for rows in row_chunks(index)])
