"""RUN/report.md: human-readable report on the course and outcome of a run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.checkpoint.store import CheckpointError, committed, read_manifest, step_of
from megatron_anymal.launcher.goodput import Effective, effective_time
from megatron_anymal.launcher.recoveries import recoveries
from megatron_anymal.launcher.root_cause import AttemptFailure, failures
from megatron_anymal.resilience.events import EVENTS, read
from megatron_anymal.resilience.exit_codes import Exit
from megatron_anymal.telemetry import duration

REPORT = "report.md"
# Number of newest entries shown of long lists.
_EVENTS, _FAILURES, _SAMPLES = 100, 10, 50

NEXT = {
    Exit.DONE: "Nothing: the run is complete.",
    Exit.CRASH: "Fix the cause (see below), or start the same command again: it resumes from the last good checkpoint.",
    Exit.MISTAKE: "Fix the problem named in the message above, then start the same command again.",
    Exit.REQUEUE: "Start the same command again (a scheduler may do so): it resumes from the last good checkpoint.",
    Exit.HANG: "Check the stacks named below, then start the same command again.",
    Exit.NOT_FINITE: (
        "Check the samples of the skipped steps below and the losses before them. Lower model.optim.lr or "
        "trainer.gradient_clip_val, or fix the data, then start again."
    ),
    Exit.NO_CHECKPOINT: "Restore a checkpoint from a backup, or start over in another folder.",
    Exit.CRASH_LOOP: "Restarting would fail again: fix the first cause (see below), then start the same command.",
    Exit.LOCKED: "Wait for the other job to end, stop it, or use another folder (exp_manager.explicit_log_dir).",
    Exit.SAVE_FAILED: (
        "Free disk space or fix the file system of the checkpoints, then start the same command again: it resumes from "
        "the last good checkpoint."
    ),
}


def write_report(run_dir: Path, code: Exit, text: str) -> Path:
    """Write the report of a run that has just ended, and return its path.

    Args:
        code: the run's exit code.
        text: the reason for it.

    Raises:
        OSError: the report could not be written.
    """
    path = run_dir / REPORT
    temporary = run_dir / f".{REPORT}.{os.getpid()}"
    try:
        temporary.write_text(compose_report(run_dir, code, text))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def compose_report(run_dir: Path, code: Exit, text: str) -> str:
    """Compose the text of the report."""
    events = read(run_dir)
    last = _last_good(run_dir)
    effective = effective_time(run_dir, events, complete=code == Exit.DONE, kept=step_of(last) if last else 0)
    sections = [
        _summary(run_dir, code, text, events, last, effective),
        _section("What to do next", [NEXT[code]]),
        _section("What failed", _failure_lines(failures(events))),
        _section("What happened", _timeline(events)),
        _section("Skipped steps", _skipped(run_dir, events)),
        _section("Checkpoints", _checkpoints(last, events)),
        _section("Slow ranks", _stragglers(events)),
        _section("Restarts", [f"- {recovery}" for recovery in recoveries(events)]),
        _section("Time", _time_lines(effective)),
        _section("Operations", _operation_lines(_rows(run_dir / "metrics.jsonl"))),
    ]
    return "\n".join(sections)


def _summary(
    run_dir: Path, code: Exit, text: str, events: list[dict[str, Any]], last: Optional[Path], effective: Effective
) -> str:
    attempts = {event.get("attempt", 0) for event in events if event["kind"] == "start"}
    reached = max((int(event.get("step", -1)) for event in events), default=-1)
    ratio = f"{effective.ratio:.1%}" if effective.wall else "unknown"
    lines = [
        f"# Run {run_dir.name}: {code.name.lower().replace('_', ' ')}",
        "",
        f"- **Exit code {int(code)}**: {code.meaning}.",
        *([f"- Why: {_one_line(text)}"] if text and text != code.meaning else []),
        f"- Attempts: {len(attempts)}; last good checkpoint: {f'step {step_of(last)}' if last else 'none'}; furthest "
        f"step recorded: {reached if reached >= 0 else 'none'}.",
        f"- Effective training time: {ratio} (see Time).",
        f"- All events: {EVENTS}; output of the ranks: logs/.",
        "",
    ]
    return "\n".join(lines)


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"## {title}", "", *(list(lines) or ["Nothing."]), ""])


def _failure_lines(failures: list[AttemptFailure]) -> list[str]:
    lines = [f"The last {_FAILURES} of {len(failures)}:", ""] if len(failures) > _FAILURES else []
    for failure in failures[-_FAILURES:]:
        lines += [f"### Attempt {failure.attempt}: {_origin(failure.first)}", "", _one_line(failure.first["text"]), ""]
        lines += _evidence(failure.first)
        if failure.others:
            lines += ["Afterwards, and probably as a consequence:", ""]
            lines += [f"- {_origin(event)}: {_one_line(event['text'])}" for event in failure.others]
            lines.append("")
    return lines


def _evidence(event: Mapping[str, Any]) -> list[str]:
    """Traceback, last output or stacks of a failure."""
    lines: list[str] = []
    for name in ("traceback", "output"):
        if event.get(name):
            lines += ["```", str(event[name]).rstrip(), "```", ""]
    for rank, frames in (event.get("where") or {}).items():
        if frames:
            lines += [f"Main thread of rank {rank}, innermost frame first:", "", "```", *frames[:12], "```", ""]
    if event.get("stacks"):
        lines += [f"Stacks of all threads: {', '.join(str(path) for path in event['stacks'].values())}", ""]
    return lines


def _timeline(events: list[dict[str, Any]]) -> list[str]:
    lines = [f"The last {_EVENTS} of {len(events)}:", ""] if len(events) > _EVENTS else []
    begun = float(events[0]["time"]) if events else 0.0
    for event in events[-_EVENTS:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        after = duration(float(event["time"]) - begun)
        lines.append(
            f"- {when} (+{after}) attempt {event.get('attempt', 0)}, {_origin(event)}: {_one_line(event['text'])}"
        )
    return lines


def _skipped(run_dir: Path, events: list[dict[str, Any]]) -> list[str]:
    rows = [event for event in events if event["kind"] == "skipped_step"] or _rows(run_dir / "skipped_steps.jsonl")
    lines = []
    for row in rows[-_SAMPLES:]:
        samples = [str(sample) for sample in row.get("samples") or []]
        more = f" and {len(samples) - _SAMPLES} more" if len(samples) > _SAMPLES else ""
        lines.append(f"- step {row.get('step')}: {', '.join(samples[:_SAMPLES]) or 'samples unknown'}{more}")
    unread = len(_rows(run_dir / "skipped_samples.jsonl"))
    if unread:
        lines += ["", f"Samples left out of steps: {unread}, listed in skipped_samples.jsonl."]
    return lines


def _checkpoints(last: Optional[Path], events: list[dict[str, Any]]) -> list[str]:
    newest = (
        f"Last good checkpoint: {last} (its manifest is valid; its files are verified on load)." if last else "None."
    )
    failed = [f"- step {e.get('step')}: {_one_line(e['text'])}" for e in events if e["kind"] == "save_failed"]
    return [newest, "", *(["Failed saves:", "", *failed] if failed else ["No save failed."])]


def _stragglers(events: list[dict[str, Any]]) -> list[str]:
    times: dict[str, list[int]] = {}
    for event in (e for e in events if e["kind"] == "straggler"):
        ranks = event.get("ranks") or {str(event.get("rank")): None}
        for rank in ranks:
            times.setdefault(f"rank {rank}", []).append(int(event.get("step", -1)))
    return [
        f"- {rank}: slow in {len(steps)} log lines, first at step {min(steps)}, last at step {max(steps)}"
        for rank, steps in sorted(times.items())
    ]


def _time_lines(effective: Effective) -> list[str]:
    if not effective.wall:
        return ["No start was recorded."]
    return [
        f"- Wall time since the first start: {duration(effective.wall)} ({effective.wall:.1f} s)",
        f"- Productive: {duration(effective.productive)} ({effective.productive:.1f} s) in {effective.steps} steps",
        f"- Effective-training-time ratio: {effective.ratio:.4f}",
        "",
        "Formula: productive seconds / wall seconds since the run's first start. Productive time is that of the steps "
        "that survived: for each line of metrics.jsonl, its step_seconds times the number of steps since the previous "
        "line. Steps that were lost and repeated count once; if the run is not complete, only steps up to the last "
        "good checkpoint count. Startup, validation, waits for saves, lost steps and time between jobs are not "
        "productive.",
    ]


def _operation_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Rates of floating-point operations, as means over the time of the steps."""
    steps = [row for row in rows if "step_seconds" in row]
    ends = [0, *(int(row["step"]) for row in steps)]
    weighted = [
        (float(row["step_seconds"]) * (end - begin), row)
        for row, begin, end in zip(steps, ends, ends[1:])
        if "tflops_per_gpu" in row
    ]
    whole = sum(seconds for seconds, _ in weighted)
    if whole <= 0:
        return ["Not logged."]

    def mean(name: str) -> float:
        return sum(seconds * float(row[name]) for seconds, row in weighted) / whole

    def share(name: str, title: str = "") -> str:
        return f", {mean(name):.1%} of the peak{title}" if all(name in row for _, row in weighted) else ""

    return [
        f"- Needed operations: {mean('tflops_per_gpu'):.3g} TFLOP/s per GPU{share('mfu', ' (MFU)')}",
        f"- With repeated ones: {mean('hardware_tflops_per_gpu'):.3g} TFLOP/s per GPU{share('hfu', ' (HFU)')}",
        f"- Encoders, while they run: {mean('encoder_tflops'):.3g} TFLOP/s per GPU{share('encoder_utilization')}",
        f"- Llama and projectors, in passes: {mean('llama_tflops'):.3g} TFLOP/s per GPU{share('llama_utilization')}",
    ]


def _last_good(run_dir: Path) -> Optional[Path]:
    for folder in committed(run_dir / "checkpoints"):
        try:
            read_manifest(folder)
            return folder
        except CheckpointError:
            continue
    return None


def _origin(event: Mapping[str, Any]) -> str:
    rank, step = int(event.get("rank", -1)), int(event.get("step", -1))
    ranks = event.get("ranks") if event["kind"] == "hang" else None
    who = f"rank {rank}" if rank >= 0 else "launcher"
    if ranks is not None:
        who = "ranks " + ", ".join(map(str, ranks)) if len(ranks) > 1 else who if ranks else "no rank of this node"
    kind = event["kind"] + (f" ({event['cause']})" if event.get("cause") else "")
    return f"{who}{f', step {step}' if step >= 0 else ''}, {kind}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
