"""What a layout search answers, as text and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_anymal.config import ConfigError
from megatron_anymal.model.memory.rank_memory import Held
from megatron_anymal.model.memory.sizes import Recompute
from megatron_anymal.planning.layouts.enumeration import Layout
from megatron_anymal.planning.layouts.operations import step_operations
from megatron_anymal.planning.layouts.search import Candidate, LayoutProblem, Miss, SearchResult
from megatron_anymal.telemetry import duration

_GB = 1e9
_KINDS = ("weights", "gradients", "optimizer", "activations", "working")


@dataclass(frozen=True)
class LayoutRow:
    """One layout's figures.

    Attributes:
        layout: the parallel layout.
        recompute: its recomputation.
        replicas: data-parallel size.
        micro_batches: per step and replica.
        seconds: of a step.
        tokens_per_second: LLM tokens of the whole job.
        mfu: the model's own operations as a share of all GPUs' peak in `number_format`.
        number_format: of the layers' matrix products: bf16, fp8 or fp32.
        bubble: share of the step in which stages wait for each other.
        exposed: share of the step that is communication which nothing hides.
        memory_gb: what the fullest rank holds, in 1e9 bytes.
        free_gb: what is left of the memory that may be used.
        days: until the last step.
        gpu_hours: until the last step, over all GPUs.
    """

    layout: Layout
    recompute: Recompute
    replicas: int
    micro_batches: int
    seconds: float
    tokens_per_second: float
    mfu: float
    number_format: str
    bubble: float
    exposed: float
    memory_gb: float
    free_gb: float
    days: float
    gpu_hours: float


def row_of(problem: LayoutProblem, candidate: Candidate) -> LayoutRow:
    """Compute a layout's figures."""
    config, step = problem.config, candidate.step
    number_format = candidate.inputs.number_format
    needed = step_operations(config.model, problem.hf, problem.work, problem.encoders)
    most = candidate.choice.held[candidate.choice.worst].total
    hours = config.trainer.max_steps * step.seconds / 3600
    return LayoutRow(
        layout=candidate.layout,
        recompute=candidate.choice.recompute,
        replicas=config.world_size // candidate.layout.applied(config.model).model_parallel_size,
        micro_batches=candidate.inputs.load.number,
        seconds=step.seconds,
        tokens_per_second=problem.work.tokens / step.seconds,
        mfu=needed / (step.seconds * config.world_size * problem.gpu.peak(number_format)),
        number_format=number_format,
        bubble=step.bubble,
        exposed=step.exposed,
        memory_gb=most / _GB,
        free_gb=(problem.memory - most) / _GB,
        days=hours / 24,
        gpu_hours=hours * config.world_size,
    )


def render(problem: LayoutProblem, result: SearchResult, notes: Sequence[str]) -> str:
    """Format the answer: assumptions, the best layouts, and why faster ones do not fit."""
    config, gpu = problem.config, problem.gpu
    rows = [row_of(problem, candidate) for candidate in result.ranked]
    lines = [
        f"{config.world_size:,} x {gpu.name} in nodes of {config.trainer.devices}; "
        f"{problem.memory / _GB:.1f} GB of each may be used",
        f"{problem.work.samples:,} samples and {problem.work.tokens:,.0f} tokens per step; {problem.work.origin}",
        *notes,
        f"{result.allowed:,} layouts are allowed; the memory of {result.examined:,} was counted and "
        f"{result.simulated:,} were simulated. No other can be faster than the last one shown.",
        "",
        *_table(rows),
    ]
    if result.misses:
        lines += ["", "Might be faster, but do not fit even with every layer recomputed:"]
        lines += [f"  {_miss(miss, problem.memory)}" for miss in result.misses]
    return "\n".join(lines)


def mfu_of(row: LayoutRow) -> str:
    """Format the share of the peak, naming the peak if it is not that of bf16."""
    return f"{row.mfu:.1%}" + ("" if row.number_format == "bf16" else f" of {row.number_format}")


def to_dict(problem: LayoutProblem, result: SearchResult, notes: Sequence[str]) -> dict[str, Any]:
    """Return the answer as plain values."""
    rows = []
    for candidate in result.ranked:
        row = asdict(row_of(problem, candidate))
        held = [asdict(stage) for stage in candidate.choice.held]
        rows.append({**row, "layout": candidate.layout._asdict(), "name": str(candidate.layout), "held_by_stage": held})
    misses = [
        {"name": str(miss.layout), "layout": miss.layout._asdict(), "stage": miss.stage, "held": asdict(miss.held)}
        for miss in result.misses
    ]
    return {
        "gpus": problem.config.world_size,
        "gpu": problem.gpu.name,
        "memory_bytes": problem.memory,
        "workload": asdict(problem.work),
        "notes": list(notes),
        "allowed": result.allowed,
        "examined": result.examined,
        "simulated": result.simulated,
        "layouts": rows,
        "misses": misses,
    }


def nothing_fits(problem: LayoutProblem, result: SearchResult) -> ConfigError:
    """Return the error for a run of which no layout fits: the nearest miss, and what would make it fit."""
    nearest = min(result.misses, key=lambda miss: miss.held.total)
    held, lacking = nearest.held, nearest.held.total - problem.memory
    state = held.weights + held.gradients + held.optimizer
    fixes = [f"a GPU with {nearest.held.total / 0.9 / _GB:.0f} GB (--gpu)", "more GPUs (--gpus)"]
    if held.activations + held.working > lacking:
        fixes.append("a smaller data.seq_length or model.micro_batch_size")
    if held.gradients + held.optimizer > lacking and state > problem.memory / 2:
        fixes.append("a frozen Llama with adapters (model.language_model.freeze=true model.lora.r=8)")
    return ConfigError(
        f"no layout fits. The nearest: {_miss(nearest, problem.memory)}. It needs {', or '.join(fixes)}."
    )


def _miss(miss: Miss, memory: int) -> str:
    lacking = (miss.held.total - memory) / _GB
    return f"{miss.layout}: {lacking:.1f} GB too much on stage {miss.stage} ({_parts(miss.held)})"


def _parts(held: Held) -> str:
    return ", ".join(f"{kind} {getattr(held, kind) / _GB:.1f}" for kind in _KINDS)


def _table(rows: Sequence[LayoutRow]) -> list[str]:
    titles = ("layout", "recompute", "replicas", "packs", "step", "tokens/s", "MFU", "bubble", "exposed", "memory")
    cells = [(*titles, "free", "time", "GPU hours")]
    for row in rows:
        cells.append(
            (
                *(str(row.layout), str(row.recompute), f"{row.replicas:,}", f"{row.micro_batches:,}"),
                *(f"{row.seconds:.3g}s", f"{row.tokens_per_second:,.0f}", mfu_of(row)),
                *(f"{row.bubble:.1%}", f"{row.exposed:.1%}", f"{row.memory_gb:.1f} GB", f"{row.free_gb:.1f}"),
                *(duration(row.days * 86400), f"{row.gpu_hours:,.0f}"),
            )
        )
    widths = [max(len(line[at]) for line in cells) for at in range(len(cells[0]))]
    return [
        "  ".join(
            f"{cell:<{w}}" if at < 2 else f"{cell:>{w}}" for at, (cell, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    ]
