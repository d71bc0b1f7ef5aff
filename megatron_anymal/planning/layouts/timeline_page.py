"""A page that shows one step of each layout: a timeline of every stage, and its memory over time."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_anymal.model.memory.rank_memory import kept_by_chunk
from megatron_anymal.planning.layouts.report import mfu_of, row_of
from megatron_anymal.planning.layouts.search import Candidate, LayoutProblem
from megatron_anymal.planning.layouts.simulation import TimelineSpan
from megatron_anymal.planning.layouts.step_time import StepTime, step_time

# Most passes of a stage that stay distinguishable; a longer step is cut to fewer micro-batches, at least twice as many
# as there are stages.
_MOST_PASSES = 96
_WIDTH, _ROW, _GAP, _LEFT, _PLOT = 900, 20, 4, 60, 170
# Narrower passes have no room for their number.
_NUMBERED = 14

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --paper: #ffffff; --line: #c9d1d9; --idle: #e3e7eb; --curve: 42%;
  --forward: #3b78c3; --backward: #d98324; --exchange: #8f5fbf; --reduce: #c2455e; --update: #4a8f5c; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --paper: #14171a; --line: #3a4149;
  --idle: #2b3137; --curve: 68%;
  --forward: #6aa5ec; --backward: #f0a34e; --exchange: #b68be0; --reduce: #ea7188; --update: #74bf88; } }
body { font: 14px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper); margin: 24px; }
.layouts { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 32px; }
svg { width: 100%; height: auto; } svg text { fill: var(--text); font-size: 12px; }
svg text.number { fill: var(--paper); font-size: 10px; text-anchor: middle; }
.idle { fill: var(--idle); } .forward { fill: var(--forward); } .backward { fill: var(--backward); }
.exchange { fill: var(--exchange); } .reduce { fill: var(--reduce); } .update { fill: var(--update); }
.axis { stroke: var(--line); } .limit { stroke: var(--reduce); stroke-dasharray: 4 3; }
.curve { fill: none; stroke-width: 1.5; } p { margin: 12px 0 4px; } td { padding: 0 12px 0 0; }
.key { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 12px; vertical-align: -1px; }
"""
_KEYS = {
    "forward": "forward",
    "backward": "backward, with recomputation",
    "exchange": "messages between stages, including waits",
    "reduce": "gradients (exposed)",
    "update": "optimizer and gathering of weights",
    "idle": "bubble",
}


def timeline_page(problem: LayoutProblem, candidates: Sequence[Candidate]) -> str:
    """Return the page for the given layouts, side by side."""
    keys = "".join(f'<span class="key" style="background: var(--{name})"></span>{text}' for name, text in _KEYS.items())
    title = f"{problem.config.world_size:,} x {problem.gpu.name}"
    shown = [(one, *_shown_step(one)) for one in candidates]
    # Whole steps share one time axis, so that their lengths can be compared; lengths of cut steps are not comparable.
    whole = all(number == one.inputs.load.number for one, number, _ in shown)
    longest = max(step.seconds for _, _, step in shown) if whole else 0.0
    sections = "".join(f"<section>{_section(problem, *one, longest)}</section>" for one in shown)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>One step: {html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>One step on {html.escape(title)}</h1>"
        f'<p>{keys}</p><div class="layouts">{sections}</div></body></html>\n'
    )


def _section(problem: LayoutProblem, candidate: Candidate, number: int, step: StepTime, longest: float) -> str:
    row = row_of(problem, candidate)
    facts = {
        "step": f"{row.seconds:.3g} s",
        "tokens/s": f"{row.tokens_per_second:,.0f}",
        "MFU": mfu_of(row),
        "bubble": f"{row.bubble:.1%}",
        "exposed communication": f"{row.exposed:.1%}",
        "memory": f"{row.memory_gb:.1f} GB, {row.free_gb:.1f} GB free",
        "recompute": str(row.recompute),
    }
    table = "".join(f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>" for name, value in facts.items())
    what = "The whole step"
    if number < row.micro_batches:
        what = (
            f"A step of {number} instead of {row.micro_batches} micro-batches: its bubble is a larger share of the step"
        )
    title = html.escape(str(row.layout))
    scale = (_WIDTH - _LEFT) / (longest or step.seconds)
    pictures = f"<p>{what}</p>{_timeline(step, scale)}{_memory(problem, candidate, step, scale)}"
    return f"<h2>{title}</h2><table>{table}</table>{pictures}"


def _shown_step(candidate: Candidate) -> tuple[int, StepTime]:
    """Simulate the step with its timeline, with as many micro-batches as a page can show."""
    inputs = candidate.inputs
    stages = len(inputs.sizes.stages)
    per_batch = 2 * max(len(chunks) for chunks in inputs.sizes.stages)
    most = max(2, _MOST_PASSES // per_batch // stages) * stages
    shown = min(inputs.load.number, most)
    load = replace(inputs.load, number=shown)
    return shown, step_time(replace(inputs, load=load), candidate.choice.recompute, timeline=True)


def _timeline(step: StepTime, scale: float) -> str:
    height = len(step.pipeline.spans) * (_ROW + _GAP) + 24
    marks = []
    for stage, spans in enumerate(step.pipeline.spans):
        top = stage * (_ROW + _GAP)
        marks.append(f'<text x="0" y="{top + 14}">stage {stage}</text>')
        marks.append(_box("idle", 0.0, step.seconds, top, scale, "waiting"))
        for span in spans:
            marks.append(_box(span.kind, span.start, span.end, top, scale, _name(span)))
            marks.append(_number(span, top, scale))
        end, reduction = step.pipeline.ends[stage], step.reductions[stage]
        marks.append(_box("reduce", end, end + reduction, top, scale, "gradient reduction"))
        marks.append(_box("update", step.seconds - step.update, step.seconds, top, scale, "optimizer"))
    marks.append(_axis(height - 20, scale))
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="timeline">{"".join(marks)}</svg>'


def _name(span: TimelineSpan) -> str:
    if span.kind == "exchange":
        return f"messages {1000 * (span.end - span.start):.3g} ms"
    return f"{span.kind} of micro-batch {span.micro_batch}, chunk {span.chunk}: {1000 * (span.end - span.start):.3g} ms"


def _number(span: TimelineSpan, top: float, scale: float) -> str:
    """The micro-batch's number, drawn in the box of its pass."""
    if span.kind == "exchange" or (span.end - span.start) * scale < _NUMBERED:
        return ""
    middle = _LEFT + (span.start + span.end) / 2 * scale
    return f'<text class="number" x="{middle:.1f}" y="{top + 14}">{span.micro_batch}</text>'


def _box(kind: str, start: float, end: float, top: float, scale: float, title: str) -> str:
    if end <= start:
        return ""
    x, width = _LEFT + start * scale, max(0.3, (end - start) * scale - 0.3)
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{top}" width="{width:.2f}" height="{_ROW}"><title>{title}</title></rect>'
    )


def _axis(top: float, scale: float) -> str:
    seconds = (_WIDTH - _LEFT) / scale
    ticks = "".join(
        f'<text x="{_LEFT + part * (_WIDTH - _LEFT) - 12:.0f}" y="{top + 14}">{part * seconds:.3g} s</text>'
        for part in (0.0, 0.25, 0.5, 0.75, 0.96)
    )
    return f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{top}" y2="{top}"/>{ticks}'


def _memory(problem: LayoutProblem, candidate: Candidate, step: StepTime, scale: float) -> str:
    """Stored state and held activations of one rank per stage over the step, with the memory limit."""
    height = _PLOT + 30
    unit = (_PLOT - 12) / problem.memory
    limit = _PLOT - problem.memory * unit
    marks = [
        f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH}" y1="{limit:.1f}" y2="{limit:.1f}"/>',
        *(
            f'<text x="0" y="{_PLOT - size * unit + 4:.1f}">{size / 1e9:.0f} GB</text>'
            for size in (0.0, problem.memory / 2, problem.memory)
        ),
    ]
    stages, keys = len(step.pipeline.spans), ""
    for stage in range(stages):
        points = " ".join(
            f"{_LEFT + time * scale:.1f},{_PLOT - size * unit:.1f}"
            for time, size in _held_over_time(candidate, step, stage)
        )
        color = f"hsl({200 + 300 * stage // stages} 65% var(--curve))"
        marks.append(
            f'<polyline class="curve" style="stroke: {color}" points="{points}"><title>stage {stage}</title></polyline>'
        )
        keys += f'<span class="key" style="background: {color}"></span>{stage}'
    marks.append(_axis(_PLOT, scale))
    picture = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="memory">{"".join(marks)}</svg>'
    return f"<p>Memory of one rank, without temporary tensors, by stage: {keys}</p>{picture}"


def _held_over_time(candidate: Candidate, step: StepTime, stage: int) -> Iterator[tuple[float, int]]:
    """Yield the corners of the curve: seconds and bytes."""
    held, chunks = candidate.choice.held[stage], candidate.inputs.sizes.stages[stage]
    kept = [kept_by_chunk(candidate.inputs.sizes, chunk, candidate.choice.recompute) for chunk in chunks]
    size = held.weights + held.gradients + held.optimizer
    yield 0.0, size
    for span in step.pipeline.spans[stage]:
        if span.kind != "exchange":
            time, change = (span.start, kept[span.chunk]) if span.kind == "forward" else (span.end, -kept[span.chunk])
            yield time, size
            size += change
            yield time, size
    yield step.seconds, size
