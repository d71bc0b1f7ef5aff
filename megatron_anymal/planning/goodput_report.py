"""What `anymal plan goodput` answers: the goodput of a job on several numbers of GPUs, as data and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_anymal.planning.goodput import FailingJob, Shares, shares
from megatron_anymal.planning.goodput_inputs import Value, job_of, nodes_of
from megatron_anymal.planning.save_interval import best_interval, daly, young
from megatron_anymal.telemetry import duration

# Intervals of the curve, as multiples of the best one.
_MULTIPLES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)
# Characters of the longest bar.
_BAR = 48
# Below this ratio a job is said never to finish anything.
_NOTHING = 1e-3


@dataclass(frozen=True)
class Point:
    """A save interval and what comes of it."""

    # Steps between saves.
    steps: int
    # The same in seconds of steps.
    seconds: float
    # Expected shares of the wall time.
    shares: Shares


@dataclass(frozen=True)
class GoodputResult:
    """The goodput of a job on one number of GPUs."""

    # Number of GPUs.
    gpus: int
    # Number of nodes that hold them.
    nodes: int
    # The job, as the model sees it.
    job: FailingJob
    # At the present save interval.
    present: Point
    # At the best one.
    best: Point
    # Around the best one and at the present one, from short to long intervals.
    curve: tuple[Point, ...]


def evaluate(values: Mapping[str, Value], gpus: int) -> GoodputResult:
    """Evaluate the model for a number of GPUs.

    Args:
        values: as returned by `goodput_inputs.resolve`.
    """
    job = job_of(values, gpus)

    def point(steps: int) -> Point:
        return Point(steps, steps * job.step, shares(job, steps))

    present, best = int(values["save_every"].number), best_interval(job)
    around = {job.unit * max(1, round(best * multiple / job.unit)) for multiple in _MULTIPLES}
    curve = tuple(point(steps) for steps in sorted({*around, present}))
    return GoodputResult(gpus, nodes_of(values, gpus), job, point(present), point(best), curve)


def warnings(result: GoodputResult) -> list[str]:
    """Statements on inputs with which a job hardly advances."""
    job, lines = result.job, []
    if job.mtbf <= job.recovery.mean:
        lines.append(
            f"a failure comes every {_time(job.mtbf)}, but a recovery takes {_time(job.recovery.mean)}: most "
            "recoveries are interrupted by the next failure."
        )
    if result.best.shares.ratio < _NOTHING:
        lines.append("nothing is ever finished: less than 0.1 % of the time is effective at any save interval.")
    if result.present.seconds >= job.mtbf:
        lines.append(
            f"the present save interval, {_time(result.present.seconds)}, is longer than the mean time between "
            f"failures, {_time(job.mtbf)}: most intervals are lost before their save."
        )
    if job.write > result.present.seconds:
        lines.append(
            f"writing a save takes {_time(job.write)}, longer than the present interval of "
            f"{_time(result.present.seconds)}: each save waits for the one before."
        )
    return [f"{result.gpus:,} GPUs: {line}" for line in lines]


def to_dict(values: Mapping[str, Value], results: Sequence[GoodputResult], notes: Sequence[str]) -> dict[str, Any]:
    """Return inputs, results and notes as plain values; times are in seconds unless their name says otherwise."""
    rows = []
    for result in results:
        job = result.job
        rows.append(
            {
                "gpus": result.gpus,
                "nodes": result.nodes,
                "mtbf_seconds": job.mtbf,
                "recovery_seconds": job.recovery.mean,
                "peer_recovery_seconds": job.peers.recovery.mean if job.peers else None,
                "present": _plain(result.present),
                "best": _plain(result.best),
                "young_seconds": None if job.peers else young(job),
                "daly_seconds": None if job.peers else daly(job),
                "curve": [_plain(point) for point in result.curve],
                "warnings": warnings(result),
            }
        )
    inputs = {name: {"value": value.number, "origin": value.origin} for name, value in values.items()}
    return {"inputs": inputs, "notes": list(notes), "results": rows}


def render(values: Mapping[str, Value], results: Sequence[GoodputResult], notes: Sequence[str]) -> str:
    """Format inputs with their origin, a line per number of GPUs, and the curve of the last one as a plot."""
    lines = ["Inputs", *_inputs(values), *(f"  {note}" for note in notes), ""]
    lines += ["Expected effective-training-time ratio, and the loss at the best save interval", *_table(results), ""]
    lines += [*_plot(results[-1]), "", _advice(results[-1])]
    lines += [f"warning: {text}" for result in results for text in warnings(result)]
    return "\n".join(lines)


def _plain(point: Point) -> dict[str, Any]:
    return {"steps": point.steps, "seconds": point.seconds, **asdict(point.shares)}


def _inputs(values: Mapping[str, Value]) -> list[str]:
    rows = [(name, _number(value.number), value.origin) for name, value in values.items()]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f"  {name:<{widths[0]}}  {number:>{widths[1]}}  {origin}" for name, number, origin in rows]


def _table(results: Sequence[GoodputResult]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("GPUs", "nodes", "failure", "now:", "", "best:", "", "", "", "", "", "Young", "Daly"),
        ("", "", "every", "steps", "ratio", "steps", "time", "ratio", "stalls", "lost", "recovery", "steps", "steps"),
    ]
    for result in results:
        job, best = result.job, result.best
        checks = ("-", "-") if job.peers else tuple(f"{of(job) / job.step:,.0f}" for of in (young, daly))
        rows.append(
            (
                *(f"{result.gpus:,}", f"{result.nodes:,}", _time(job.mtbf), f"{result.present.steps:,}"),
                *(_percent(result.present.shares.ratio), f"{best.steps:,}", _time(best.seconds)),
                *(_percent(share) for share in asdict(best.shares).values()),
                *checks,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]


def _plot(result: GoodputResult) -> list[str]:
    """Loss by save interval: a bar of s (stalls), l (lost steps) and r (recovery)."""
    worst = max(1.0 - point.shares.ratio for point in result.curve)
    lines = [f"Save interval on {result.gpus:,} GPUs: loss as s (stalls), l (lost steps), r (recovery)"]
    lines.append(f"  {'steps':>9}  {'time':>7}  {'ratio':>7}")
    for point in result.curve:
        ends = [0.0, point.shares.stalls, point.shares.lost, point.shares.recovery]
        marks = [round(_BAR * sum(ends[: i + 1]) / worst) for i in range(4)]
        bar = "".join(letter * (marks[i + 1] - marks[i]) for i, letter in enumerate("slr"))
        named = {result.best.steps: "best", result.present.steps: "present"}.get(point.steps, "")
        row = f"  {point.steps:>9,}  {_time(point.seconds):>7}  {_percent(point.shares.ratio):>7}  {bar}"
        lines.append(f"{row}  {named}".rstrip())
    return lines


def _advice(result: GoodputResult) -> str:
    now, best = result.present, result.best
    if best.shares.ratio < _NOTHING:
        return f"No save interval helps on {result.gpus:,} GPUs."
    if now.steps == best.steps:
        return f"The present save interval is the best one on {result.gpus:,} GPUs."
    gain = f"{_percent(best.shares.ratio)} instead of {_percent(now.shares.ratio)} at {now.steps:,}"
    return (
        f"Save every {best.steps:,} steps ({_time(best.seconds)}) on {result.gpus:,} GPUs: {gain}. "
        f"Set exp_manager.checkpoint.every_n_train_steps={best.steps}."
    )


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g}s" if seconds < 10 else duration(seconds)


def _number(number: float) -> str:
    """A value with three significant digits, or all of its whole part."""
    digits = max(0, 2 - math.floor(math.log10(abs(number)))) if number else 0
    text = f"{number:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
