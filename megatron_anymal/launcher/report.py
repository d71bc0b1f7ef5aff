"""RUN/report.md: what happened to a run, for a person who comes to it afterwards."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.checkpoint.store import CheckpointError, committed, read_manifest, step_of
from megatron_anymal.launcher.goodput import Effective, effective_time
from megatron_anymal.launcher.root_cause import Failure, failures
from megatron_anymal.resilience.events import EVENTS, read
from megatron_anymal.resilience.exit_codes import Exit
from megatron_anymal.telemetry import duration

REPORT = "report.md"
# What is shown of long lists: the newest.
_EVENTS, _FAILURES, _SAMPLES = 100, 10, 50

NEXT = {
    Exit.DONE: "Nothing: the run is complete.",
    Exit.CRASH: "Mend the cause above, or start the same command again: it goes on from the last good checkpoint.",
    Exit.MISTAKE: "Mend what the message above names, then start the same command again.",
    Exit.REQUEUE: "Start the same command again (a scheduler may do so): it goes on from the last good checkpoint.",
    Exit.HANG: "Look at the stacks named above, then start the same command again.",
    Exit.NOT_FINITE: (
        "Look at the samples of the skipped steps below and at the losses before them. Lower model.optim.lr or "
        "trainer.gradient_clip_val, or mend the data, then start again."
    ),
    Exit.NO_CHECKPOINT: "Restore a checkpoint from a copy, or start anew in another folder.",
    Exit.CRASH_LOOP: "Starting again would fail again: mend the first cause above, then start the same command.",
    Exit.LOCKED: "Let the other job end or stop it, or name another folder (exp_manager.explicit_log_dir).",
    Exit.SAVE_FAILED: (
        "Make room or mend the file system of the checkpoints, then start the same command again: it goes on from the "
        "last good checkpoint."
    ),
}


def write_report(run_dir: Path, code: Exit, text: str) -> Path:
    """Write the report of a run that has just ended; returns its path.

    Args:
        code: how it ended.
        text: why.

    Raises:
        OSError: it could not be written.
    """
    path = run_dir / REPORT
    part = run_dir / f".{REPORT}.{os.getpid()}"
    try:
        part.write_text(compose_report(run_dir, code, text))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def compose_report(run_dir: Path, code: Exit, text: str) -> str:
    """The report as text."""
    events = read(run_dir)
    last = _last_good(run_dir)
    effective = effective_time(run_dir, events, complete=code == Exit.DONE, kept=step_of(last) if last else 0)
    sections = [
        _summary(run_dir, code, text, events, last, effective),
        _section("What to do next", [NEXT[code]]),
        _section("What failed", _told_failures(failures(events))),
        _section("What happened", _timeline(events)),
        _section("Skipped steps", _skipped(run_dir, events)),
        _section("Checkpoints", _checkpoints(last, events)),
        _section("Slow ranks", _stragglers(events)),
        _section("Time", _told_time(effective)),
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
        f"step told of: {reached if reached >= 0 else 'none'}.",
        f"- Effective training time: {ratio} (see Time).",
        f"- All events: {EVENTS}; what the ranks printed: logs/.",
        "",
    ]
    return "\n".join(lines)


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"## {title}", "", *(list(lines) or ["Nothing."]), ""])


def _told_failures(found: list[Failure]) -> list[str]:
    lines = [f"The last {_FAILURES} of {len(found)}:", ""] if len(found) > _FAILURES else []
    for failure in found[-_FAILURES:]:
        lines += [f"### Attempt {failure.attempt}: {_place(failure.first)}", "", _one_line(failure.first["text"]), ""]
        lines += _evidence(failure.first)
        if failure.others:
            lines += ["After it, and probably because of it:", ""]
            lines += [f"- {_place(event)}: {_one_line(event['text'])}" for event in failure.others]
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
            lines += [f"Where rank {rank} was, innermost first:", "", "```", *frames[:12], "```", ""]
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
            f"- {when} (+{after}) attempt {event.get('attempt', 0)}, {_place(event)}: {_one_line(event['text'])}"
        )
    return lines


def _skipped(run_dir: Path, events: list[dict[str, Any]]) -> list[str]:
    rows = [event for event in events if event["kind"] == "skipped_step"] or _rows(run_dir / "skipped_steps.jsonl")
    lines = []
    for row in rows[-_SAMPLES:]:
        samples = [str(sample) for sample in row.get("samples") or []]
        more = f" and {len(samples) - _SAMPLES} more" if len(samples) > _SAMPLES else ""
        lines.append(f"- step {row.get('step')}: {', '.join(samples[:_SAMPLES]) or 'samples not told'}{more}")
    unread = len(_rows(run_dir / "skipped_samples.jsonl"))
    if unread:
        lines += ["", f"Samples left out of their steps: {unread}, listed in skipped_samples.jsonl."]
    return lines


def _checkpoints(last: Optional[Path], events: list[dict[str, Any]]) -> list[str]:
    told = (
        f"Last good one: {last} (its manifest is whole; the files are verified when it is read)." if last else "None."
    )
    failed = [f"- step {e.get('step')}: {_one_line(e['text'])}" for e in events if e["kind"] == "save_failed"]
    return [told, "", *(["Saves that failed:", "", *failed] if failed else ["No save failed."])]


def _stragglers(events: list[dict[str, Any]]) -> list[str]:
    times: dict[str, list[int]] = {}
    for event in (e for e in events if e["kind"] == "straggler"):
        ranks = event.get("ranks") or {str(event.get("rank")): None}
        for rank in ranks:
            times.setdefault(f"rank {rank}", []).append(int(event.get("step", -1)))
    return [
        f"- {rank}: slow in {len(steps)} log lines, the first at step {min(steps)}, the last at step {max(steps)}"
        for rank, steps in sorted(times.items())
    ]


def _told_time(effective: Effective) -> list[str]:
    if not effective.wall:
        return ["No start was told of."]
    return [
        f"- Wall time since the first start: {duration(effective.wall)} ({effective.wall:.1f} s)",
        f"- Productive: {duration(effective.productive)} ({effective.productive:.1f} s) in {effective.steps} steps",
        f"- Effective-training-time ratio: {effective.ratio:.4f}",
        "",
        "Formula: productive seconds / wall seconds since the run's first start. Productive are the seconds of the "
        "steps that survived: for each line of metrics.jsonl its step_seconds times the steps since the line before. "
        "Steps that were lost and made again count once; where the run is not complete, only those up to the last good "
        "checkpoint. Start-up, validation, waits for saves, lost steps and time between jobs are not productive.",
    ]


def _last_good(run_dir: Path) -> Optional[Path]:
    for folder in committed(run_dir / "checkpoints"):
        try:
            read_manifest(folder)
            return folder
        except CheckpointError:
            continue
    return None


def _place(event: Mapping[str, Any]) -> str:
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
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
