"""Samples that a step left out: named, counted, written down, and the run's end where there are too many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_anymal import step_lines
from megatron_anymal.config import RunConfig
from megatron_anymal.data.planner import BatchPlanner, StepPlan
from megatron_anymal.data.records import DataError


class SkippedSamples:
    """Keeps RUN/skipped_samples.jsonl.

    Args:
        active: this rank writes it.
        say: tells the user.
    """

    def __init__(self, run_dir: Path, config: RunConfig, active: bool, say: Callable[[str], None]) -> None:
        self._path, self._config, self._active, self._say = run_dir / "skipped_samples.jsonl", config, active, say
        # Of the whole run, on the rank that writes.
        self.count = 0

    def rewind(self, step: int) -> None:
        """Forget steps after `step`, which are made again."""
        if self._active:
            self.count = len(step_lines.rewind(self._path, step))

    def note(self, step: int, plan: StepPlan, planner: BatchPlanner, bad: Mapping[str, str]) -> None:
        """Account for a step.

        Args:
            bad: name -> why it cannot be used, over all ranks.

        Raises:
            DataError: more of its samples are unusable than data.max_bad_share allows, on all ranks.
        """
        too_long = [planner.key(int(plan.dataset[place]), int(plan.sample[place])) for place in plan.dropped]
        left_out = [*bad.items(), *((name, "longer than data.seq_length") for name in too_long)]
        if not left_out:
            return
        self.count += len(left_out)
        if self._active:
            self._write(step, left_out)
        for name, why in bad.items():
            self._say(f"skipped {name}: {why}")
        size, allowed = self._config.model.global_batch_size, self._config.data.max_bad_share
        if len(bad) / size > allowed:
            raise DataError(
                f"step {step}: {len(bad)} of {size} samples cannot be read, above data.max_bad_share={allowed}. They "
                f"are listed in {self._path}."
            )

    def _write(self, step: int, left_out: list[tuple[str, str]]) -> None:
        rows = [{"step": step, "sample": name, "reason": why} for name, why in left_out]
        # A full disk must not end the run; what cannot be read is told on the console too.
        try:
            step_lines.append(self._path, rows)
        except OSError as error:
            self._say(f"warning: the samples left out in step {step} could not be written down: {error}.")
