"""Skip steps with a non-finite gradient on all ranks, record them, and end the run if too many occur in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_anymal import step_lines
from megatron_anymal.resilience.events import record
from megatron_anymal.resilience.exit_codes import Exit

SKIPPED = "skipped_steps.jsonl"
# A larger squared norm does not fit in fp32.
_LARGEST = float(torch.finfo(torch.float32).max)


class NotFinite(RuntimeError):
    """Too many steps in a row had a non-finite gradient."""

    exit_code = Exit.NOT_FINITE


def squared_norm(wrapped: Sequence[Any], device: torch.device) -> Tensor:
    """Squared norm of all gradients in this rank's buffers ([] float64); non-finite if any gradient is.

    A parameter held by several ranks may be counted several times, which does not matter for this check.

    Args:
        wrapped: this rank's virtual pipeline chunks, wrapped by megatron-core's data parallelism.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for chunk in wrapped:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            total += torch.linalg.vector_norm(buffer.grad_data).double() ** 2
    return total


def all_finite(report: Sequence[float], squared: float) -> bool:
    """Whether the losses and gradients of a step, summed over all ranks, are finite in fp32."""
    return all(math.isfinite(value) for value in report) and math.isfinite(squared) and squared <= _LARGEST


class SkippedSteps:
    """Counts skipped steps and records their samples.

    Args:
        limit: number of skipped steps in a row that ends the run.
        active: whether this rank writes RUN/skipped_steps.jsonl.
    """

    def __init__(self, run_dir: Path, limit: int, active: bool) -> None:
        self._run_dir, self._limit, self._active = run_dir, limit, active
        self._path = run_dir / SKIPPED
        # The latest skipped steps without a good step in between: (step, samples).
        self._row: list[tuple[int, list[str]]] = []

    def rewind(self, step: int) -> None:
        """Forget steps after `step`, which will be repeated, and restore the streak that ends at it. Collective."""
        row: list[Any] = [self._read(step) if self._active else []]
        dist.broadcast_object_list(row, src=0)
        self._row = row[0]

    def note(self, step: int, samples: Sequence[str]) -> None:
        """Record a skipped step.

        Raises:
            NotFinite: the limit is reached; raised on all ranks.
        """
        if self._row and self._row[-1][0] != step - 1:
            self._row.clear()
        self._row.append((step, list(samples)))
        if self._active:
            # A full disk must not end the run; `record` below warns about it.
            with suppress(OSError):
                step_lines.append(self._path, [{"step": step, "samples": list(samples)}])
            text = f"step {step}: the gradient is not finite; no weight was changed"
            record(self._run_dir, "skipped_step", text, step=step, samples=list(samples))
        if len(self._row) >= self._limit:
            listed = "; ".join(f"step {number}: {', '.join(names)}" for number, names in self._row)
            raise NotFinite(
                f"{len(self._row)} steps in a row (resilience.max_skipped_steps={self._limit}) had a non-finite "
                f"gradient. Their samples are listed in {self._path}: {listed}"
            )

    def _read(self, step: int) -> list[tuple[int, list[str]]]:
        kept = step_lines.rewind(self._path, step)
        last: list[tuple[int, list[str]]] = []
        for row in reversed(kept):
            if row["step"] != step - len(last):
                break
            last.insert(0, (row["step"], row["samples"]))
        return last
