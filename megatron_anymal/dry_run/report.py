"""Format the report of a dry run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_anymal.config import DataConfig, ModelConfig, RunConfig
from megatron_anymal.data.context_parallel import padded
from megatron_anymal.data.mix_stages import mean_shares, stage_lines
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.dry_run.simulate import ChunkSize, DryRun, Stage, examine
from megatron_anymal.model.memory.recompute import configured


def print_dry_run(config: RunConfig) -> None:
    """Check a run and print the memory use of each rank, without GPU, launcher or weights; start and write nothing.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: see `examine`.
    """
    # A launcher's other processes would print the same.
    if os.environ.get("RANK", "0") == "0":
        print(render(examine(config)))


def render(dry_run: DryRun) -> str:
    """Return the whole report."""
    sections = [
        _job(dry_run.config),
        "Per rank of each pipeline stage, without activations:\n" + _stages(dry_run.stages),
        _memory(dry_run),
        "Whole model, each weight counted once:\n" + _components(dry_run),
    ]
    if dry_run.samples:
        sections.append("Data:\n" + _data(dry_run))
    data = dry_run.config.data
    if data.schedule:
        lines = stage_lines(data.train, data.schedule, dry_run.config.trainer.max_steps, dry_run.mixture)
        sections.append("Stages of the training data:\n" + "\n".join(f"  {line}" for line in lines))
    if dry_run.missing:
        rows = [(f"  {key}", path) for key, path in dry_run.missing]
        sections.append(f"Not on this machine yet (paths relative to {Path.cwd()}):\n" + _table(rows, left=2))
    if dry_run.notes:
        sections.append("Notes:\n" + "\n".join(f"  {note}" for note in dry_run.notes))
    return "\n\n".join(sections)


def _job(config: RunConfig) -> str:
    model, per_replica = config.model, _quotient(config.model.samples_per_step, config.data_parallel_size)
    layout = BatchLayout.of(model, config.data.seq_length, config.data_parallel_size)
    sizes = [
        f"tensor {model.tensor_model_parallel_size}",
        f"context {model.context_parallel_size}",
        f"pipeline {model.pipeline_model_parallel_size}",
        f"{config.data_parallel_size} replica(s)",
    ]
    extra = ", sequence parallel" if model.sequence_parallel else ""
    if model.virtual_pipeline_model_parallel_size > 1:
        extra += f", {model.virtual_pipeline_model_parallel_size} virtual chunks per stage"
    multiple = layout.data_parallel_size * layout.micro_batch_size * layout.micro_batches_multiple
    longest = padded(layout.seq_length, layout.length_multiple)
    rows = [
        ("processes", f"{config.world_size:,} = {config.trainer.num_nodes} node(s) x {config.trainer.devices}"),
        ("layout", " x ".join(sizes) + extra),
        (
            "batch",
            f"{model.samples_per_step:,} samples per step, {per_replica} per replica{_alignments(model)}",
        ),
        (
            "packs",
            f"at most {longest:,} tokens; {layout.micro_batch_size} per micro-batch, a multiple of {multiple} per step",
        ),
        ("precision", config.trainer.precision + _formats(model)),
        ("recompute", "auto" if model.recompute_granularity == "auto" else str(configured(model))),
    ]
    return _table(rows, left=2)


def _formats(model: ModelConfig) -> str:
    """Name the formats of the Llama's matrices and products, if they differ from the precision."""
    products = ", NVFP4" if model.fp4 else ""
    if model.fp8:
        products = f", {'MXFP8' if model.fp8_recipe == 'mxfp8' else 'FP8'} {model.fp8}"
    return products + (f", the Llama's matrices in {model.base_quantization.upper()}" * bool(model.base_quantization))


def _alignments(model: ModelConfig) -> str:
    """The batch of each alignment."""
    parts = ", ".join(f"{name} {one.global_batch_size:,}" for name, one in model.multiplex.items())
    return f" ({parts})" if parts else ""


def _quotient(samples: int, replicas: int) -> str:
    whole, rest = divmod(samples, replicas)
    return f"{whole:,} or {whole + 1:,}" if rest else f"{whole:,}"


def _memory(dry_run: DryRun) -> str:
    """Format the memory use during a step, and the activation recomputation that it assumes."""
    memory = dry_run.memory
    assert memory is not None
    choice = memory.choice
    auto = dry_run.config.model.recompute_granularity == "auto"
    title = (
        f"Per rank during a step on a {'CPU' if memory.on_cpu else 'GPU'} ({memory.attention} attention), with packs "
    )
    title += f"full of labels and media; recompute {choice.recompute}"
    if auto and choice.memory:
        title += ", chosen: the cheapest that fits"
    rows: list[tuple[str, ...]] = [
        ("stage", "stored", "activations", "temporary", "total", "micro-batches in flight per model chunk")
    ]
    for number, held in enumerate(choice.held):
        stored = held.weights + held.gradients + held.optimizer
        sizes = (stored, held.activations, held.working, held.total)
        rows.append((str(number), *(_bytes(size) for size in sizes), ", ".join(map(str, held.in_flight))))
    lines = [f"{title}:", _table(rows, left=0, left_from=5)]
    if choice.memory:
        most = choice.held[choice.worst].total
        verdict = "fits in" if most <= choice.memory else "does NOT fit in"
        without = f"; without recompute {_bytes(choice.without)}" if choice.recompute.granularity else ""
        lines.append(f"{_bytes(most)} on stage {choice.worst} {verdict} {_bytes(choice.memory)}{without}.")
    return "\n".join(lines)


def _stages(stages: Sequence[Stage]) -> str:
    titles = ("stage", "ranks", "parameters", "trainable", "weights", "gradients", "optimizer", "total")
    rows: list[tuple[str, ...]] = [(*titles, "layers", "other modules")]
    for number, stage in enumerate(stages):
        total = stage.weight_bytes + stage.gradient_bytes + stage.optimizer_bytes
        sizes = (stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes, total)
        rows.append(
            (
                str(number),
                _span(stage.ranks),
                f"{stage.parameters:,}",
                f"{stage.trainable:,}",
                *(_bytes(size) for size in sizes),
                ", ".join(_span(chunk.layers) for chunk in stage.parts),
                _besides([name for chunk in stage.parts for name in chunk.besides]),
            )
        )
        if len(stage.parts) > 1:
            rows += [_part_row(position, chunk) for position, chunk in enumerate(stage.parts)]
    return _table(rows, left=0, left_from=len(titles))


def _part_row(number: int, part: ChunkSize) -> tuple[str, ...]:
    numbers = (f"{part.parameters:,}", f"{part.trainable:,}", _bytes(part.weight_bytes))
    return (f"chunk {number}", "", *numbers, "", "", "", _span(part.layers), _besides(part.besides))


def _besides(names: Sequence[str]) -> str:
    """ "image encoder", "image projector" become "image encoder and projector"."""
    shown: list[str] = []
    for name in names:
        if name.endswith(" projector"):
            shown[-1] += " and projector"
        else:
            shown.append(name)
    return ", ".join(shown)


def _components(dry_run: DryRun) -> str:
    counts: dict[str, tuple[int, int]] = {}
    for name, (numbers, trains) in dry_run.weights.items():
        component = _component(name)
        before = counts.get(component, (0, 0))
        counts[component] = (before[0] + numbers, before[1] + numbers * trains)
    counts["total"] = (sum(c[0] for c in counts.values()), sum(c[1] for c in counts.values()))
    rows = [("", "parameters", "", "trainable", "")]
    rows += [(name, f"{a:,}", _short(a), f"{b:,}", _short(b)) for name, (a, b) in counts.items()]
    return _table(rows, left=1)


def _component(name: str) -> str:
    """ "projectors.image.gain" belongs to the "image projector"."""
    head, _, rest = name.partition(".")
    if head == "language_model":
        return "language model"
    return f"{rest.partition('.')[0]} {head.removesuffix('s')}"


def _data(dry_run: DryRun) -> str:
    config = dry_run.config
    rows: list[tuple[str, ...]] = []
    for (split, name), count in dry_run.samples.items():
        row: tuple[str, ...] = (f"  data.{split}.{name}", f"{count:,} samples")
        if split == "train" and not config.data.schedule:
            samples, mixed = _batch_of(config.model, config.data, name)
            share = config.data.train[name].weight / sum(config.data.train[one].weight for one in mixed)
            row = (*row, f"one epoch in {count / (share * samples):,.1f} steps ({share:.0%} of the mix)")
        elif split == "train" and dry_run.mixture:
            samples = config.trainer.max_steps * config.model.global_batch_size
            share = dict(zip(config.data.train, mean_shares(dry_run.mixture, samples)))[name]
            row = (*row, f"{samples * share / count:,.2f} epochs in the run ({share:.2%} of its samples)")
        rows.append(row)
    return _table(rows, left=1, left_from=2)


def _batch_of(model: ModelConfig, data: DataConfig, dataset: str) -> tuple[int, list[str]]:
    """Samples of the global batch that a dataset of data.train is part of, and the datasets that it is mixed with."""
    for alignment in model.multiplex.values():
        if dataset in alignment.datasets:
            return alignment.global_batch_size, alignment.datasets
    return model.global_batch_size, list(data.train)


def _span(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _bytes(count: int) -> str:
    return f"{_short(count, ('', 'k', 'M', 'G', 'T'))}B" if count else "0 B"


def _short(count: int, units: Sequence[str] = ("", "k", "M", "B", "T")) -> str:
    """Format a number with two decimals and an SI unit."""
    value, power = float(count), 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.2f} {units[power]}" if power else str(count)


def _table(rows: Sequence[Sequence[str]], left: int, left_from: int | None = None) -> str:
    """Format rows as columns; the first `left` and those from `left_from` on are left-aligned, the others right."""
    columns = max(len(row) for row in rows)
    filled = [[*row, *[""] * (columns - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in filled) for column in range(columns)]
    at_left = [column < left or (left_from is not None and column >= left_from) for column in range(columns)]
    lines = [
        "  ".join(f"{cell:<{w}}" if aligned else f"{cell:>{w}}" for cell, w, aligned in zip(row, widths, at_left))
        for row in filled
    ]
    return "\n".join(line.rstrip() for line in lines)
