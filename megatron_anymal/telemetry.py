"""What a run tells: a line per log step, JSONL, loggers, progress with the time left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_anymal import step_lines

log = logging.getLogger("megatron_anymal")


class MetricsLogger(Protocol):
    """What the engine asks of a TensorBoard or W&B logger (Lightning's have it)."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics of a step."""

    def save(self) -> None:
        """Put on disk what was recorded."""


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 45s, 3m20s, 5h02m, 2d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress:
    """A counter with the time left, on standard error, at most once a second.

    Args:
        unit: of what is counted, for large counts: then the rate is told too.
    """

    def __init__(self, what: str, total: int, unit: str = ""):
        self._what, self._total, self._unit = what, total, f" {unit}" if unit else ""
        self._done, self._start, self._shown = 0, time.monotonic(), 0.0

    def advance(self, count: int = 1) -> None:
        """Count work done."""
        self._done += count
        now = time.monotonic()
        if self._done and now - self._shown >= 1.0:
            self._shown = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._write(f"{self._done}/{self._total}{self._unit}{self._rate(now)}, {duration(left)} left")

    def finish(self) -> None:
        """Say that it is done."""
        now = time.monotonic()
        self._write(f"{self._done}{self._unit} in {duration(now - self._start)}{self._rate(now)}")
        if sys.stderr.isatty():
            sys.stderr.write("\n")

    def _rate(self, now: float) -> str:
        return f", {self._done / max(now - self._start, 1e-9):,.0f}{self._unit}/s" if self._unit else ""

    def _write(self, text: str) -> None:
        end, start = ("", "\r\033[K") if sys.stderr.isatty() else ("\n", "")
        print(f"{start}{self._what}: {text}", end=end, file=sys.stderr, flush=True)


class RunLog:
    """Writes a run's metrics: console line, metrics.jsonl in the run's folder, and the loggers."""

    def __init__(self, run_dir: Path, loggers: Sequence[MetricsLogger], active: bool):
        self._loggers, self._active = list(loggers), active
        self._path = run_dir / "metrics.jsonl"
        if active:
            run_dir.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Forget lines of steps after `step`: a resumed run writes them again."""
        if self._active:
            step_lines.rewind(self._path, step)

    def write(self, step: int, metrics: Mapping[str, float], line: str = "") -> None:
        """Record metrics of a step; `line` is what the console shows."""
        if not self._active:
            return
        if line:
            self.say(line)
        # A full disk must not end the run: its checkpoints are tried again too.
        try:
            step_lines.append(self._path, [{"step": step, **metrics}])
            for logger in self._loggers:
                logger.log_metrics(dict(metrics), step)
        except OSError as error:
            self.say(f"warning: the figures of step {step} could not be written: {error}. Training goes on.")

    def save(self) -> None:
        """Put on disk what the loggers hold back; before a checkpoint, so that none is newer than its log."""
        if self._active:
            for logger in self._loggers:
                try:
                    logger.save()
                except OSError as error:
                    self.say(f"warning: a logger could not write: {error}. Training goes on.")

    def say(self, text: str) -> None:
        """A line on the console."""
        if self._active:
            print(text, flush=True)


def describe(metrics: Mapping[str, Any], *, step: int, max_steps: int, eta: float) -> str:
    """The console line of a step; behind a modality's loss stand the target tokens it was averaged over."""
    names = [name.removeprefix("loss/") for name in metrics if name.startswith("loss/")]
    losses = ", ".join(f"{name} {metrics[f'loss/{name}']:.4f} of {metrics[f'targets/{name}']:,.0f}" for name in names)
    return (
        f"step {step}/{max_steps}  loss {metrics['loss']:.6f}  [{losses}]  "
        f"{metrics['tokens_per_second']:,.0f} tokens/s  data wait {metrics['data_wait_share']:.1%}  "
        f"grad norm {metrics['grad_norm']:.3f}  lr {metrics['lr']:.3e}  {metrics['step_seconds']:.2f} s/step  "
        f"{duration(eta)} left"
    )
