"""Output of a run: one console line per log step, metrics.jsonl, loggers, and progress with the time left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megatron_anymal import step_lines

log = logging.getLogger("megatron_anymal")


class MetricsLogger(Protocol):
    """Interface of a TensorBoard or W&B logger (Lightning's loggers implement it)."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""

    def save(self) -> None:
        """Flush the recorded metrics to disk."""

    def finalize(self, status: str) -> None:
        """End the logger's own work; `status` is success or failed."""


def duration(seconds: float) -> str:
    """Format seconds for people: 45s, 3m20s, 5h02m, 2d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress:
    """A progress counter with the time left, printed to standard error at most once per second.

    Args:
        unit: the unit of the count, for large counts; if given, the rate is printed too.
    """

    def __init__(self, what: str, total: int, unit: str = ""):
        self._what, self._total, self._unit = what, total, f" {unit}" if unit else ""
        self._done, self._start, self._shown = 0, time.monotonic(), 0.0

    def advance(self, count: int = 1) -> None:
        """Count completed work."""
        self._done += count
        now = time.monotonic()
        if self._done and now - self._shown >= 1.0:
            self._shown = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._write(f"{self._done}/{self._total}{self._unit}{self._rate(now)}, {duration(left)} left")

    def skip(self, count: int) -> None:
        """Leave out work that was done before, which says nothing about the rate."""
        self._total -= count

    def finish(self) -> None:
        """Print the total count and time."""
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
        """Drop the lines of steps after `step`: a resumed run writes them again."""
        if self._active:
            step_lines.rewind(self._path, step)

    def write(self, step: int, metrics: Mapping[str, float], line: str = "") -> None:
        """Record the metrics of a step; `line` is printed on the console."""
        if not self._active:
            return
        if line:
            self.say(line)
        # A full disk must not end the run: checkpoint writes are retried, too.
        try:
            step_lines.append(self._path, [{"step": step, **metrics}])
            for logger in self._loggers:
                logger.log_metrics(dict(metrics), step)
        except OSError as error:
            self.say(f"warning: the metrics of step {step} could not be written: {error}. Training continues.")

    def save(self) -> None:
        """Flush the loggers; called before a checkpoint, so that no checkpoint is newer than its log."""
        if self._active:
            for logger in self._loggers:
                try:
                    logger.save()
                except OSError as error:
                    self.say(f"warning: a logger could not write: {error}. Training continues.")

    def abandon(self) -> None:
        """End the loggers of a run that has failed, and their threads. Never raises."""
        for logger in self._loggers:
            with suppress(Exception):
                logger.finalize("failed")

    def say(self, text: str) -> None:
        """Print a line on the console."""
        if self._active:
            print(text, flush=True)


def describe(metrics: Mapping[str, Any], *, step: int, max_steps: int, eta: float, stage: str = "") -> str:
    """Console line of a step; each modality's loss is followed by the number of target tokens it was averaged over.

    Args:
        eta: seconds until the end of the run.
        stage: name of the step's stage in data.schedule; "" without one.
    """
    names = [name.removeprefix("loss/") for name in metrics if name.startswith("loss/")]
    losses = ", ".join(f"{name} {metrics[f'loss/{name}']:.4f} of {metrics[f'targets/{name}']:,.0f}" for name in names)
    loader = f", loader {metrics['loader_memory_gib']:.2f} ({metrics['loader_growth_gib']:+.2f})"
    memory = f"{metrics['host_memory_gib']:.2f} GiB{loader if metrics['loader_memory_gib'] else ''}"
    return (
        f"step {step}/{max_steps}  {f'stage {stage}  ' if stage else ''}loss {metrics['loss']:.6f}  [{losses}]  "
        f"{metrics['tokens_per_second']:,.0f} tokens/s  data wait {metrics['data_wait_share']:.1%}  "
        f"{_updates(metrics)}  {metrics['step_seconds']:.2f} s/step  "
        f"{metrics['tflops_per_gpu']:.3g} TFLOP/s per GPU{_shares(metrics)}  memory {memory}  {duration(eta)} left"
    )


def _updates(metrics: Mapping[str, Any]) -> str:
    """Norm of the gradient and learning rate, of each alignment if there are several."""
    names = [name.removeprefix("lr/") for name in metrics if name.startswith("lr/")]
    if not names:
        return f"grad norm {metrics['grad_norm']:.3f}  lr {metrics['lr']:.3e}"
    norms = ", ".join(f"{name} {metrics[f'grad_norm/{name}']:.3f}" for name in names)
    rates = ", ".join(f"{name} {metrics[f'lr/{name}']:.3e}" for name in names)
    return f"grad norm [{norms}]  lr [{rates}]"


def _shares(metrics: Mapping[str, Any]) -> str:
    """MFU, and the utilization of encoders and Llama while they run, if the peak is known."""
    if "mfu" not in metrics:
        return ""
    names = [("encoders", "encoder"), ("Llama", "llama")] if metrics["encoder_tflops"] else []
    parts = ", ".join(f"{title} {metrics[f'{name}_utilization']:.1%}" for title, name in names)
    return f"  MFU {metrics['mfu']:.1%}" + (f" ({parts})" if parts else "")
