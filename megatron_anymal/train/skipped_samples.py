"""Record samples that a step left out, and end the run if there are too many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from megatron_anymal import step_lines
from megatron_anymal.data.planner import BatchPlanner
from megatron_anymal.data.records import DataError
from megatron_anymal.data.step_plan import StepPlan


class SkippedSamples:
    """Log of left-out samples, RUN/skipped_samples.jsonl.

    Args:
        max_bad_share: largest accepted fraction of a step's samples, or of those of an alignment, that cannot be read.
        active: whether this rank writes it.
        say: prints a message for the user.
    """

    def __init__(self, run_dir: Path, max_bad_share: float, active: bool, say: Callable[[str], None]) -> None:
        self._path, self._active, self._say = run_dir / "skipped_samples.jsonl", active, say
        self._max_bad_share = max_bad_share
        # Total over the whole run, on the rank that writes.
        self.count = 0

    def rewind(self, step: int) -> None:
        """Drop records of steps after `step`, which will run again."""
        if self._active:
            self.count = len(step_lines.rewind(self._path, step))

    def note(self, step: int, plan: StepPlan, planner: BatchPlanner, bad: Mapping[str, str]) -> None:
        """Record a step's left-out samples.

        Args:
            bad: name -> why it cannot be used, over all ranks.

        Raises:
            DataError: more of the step's samples, over all ranks, are unusable than data.max_bad_share allows; with
                model.multiplex, of the samples of one alignment.
        """
        too_long = [planner.key(int(plan.dataset[position]), int(plan.sample[position])) for position in plan.dropped]
        left_out = [*bad.items(), *((name, "longer than data.seq_length") for name in too_long)]
        if not left_out:
            return
        self.count += len(left_out)
        if self._active:
            self._write(step, left_out)
        for name, why in bad.items():
            self._say(f"skipped {name}: {why}")
        if bad:
            self._check_share(step, plan, planner, bad)

    def _check_share(self, step: int, plan: StepPlan, planner: BatchPlanner, bad: Mapping[str, str]) -> None:
        names = [planner.key(int(dataset), int(sample)) for dataset, sample in zip(plan.dataset, plan.sample)]
        of_alignment = np.zeros(len(names), np.int64) if plan.alignment is None else plan.alignment
        for number in np.unique(of_alignment):
            batch = {name for name, own in zip(names, of_alignment) if own == number}
            unusable, size = len(batch & bad.keys()), int((of_alignment == number).sum())
            if unusable / size > self._max_bad_share:
                raise DataError(
                    f"step {step}: {unusable} of {size} samples cannot be read, which is above data.max_bad_share="
                    f"{self._max_bad_share}. They are listed in {self._path}."
                )

    def _write(self, step: int, left_out: list[tuple[str, str]]) -> None:
        rows = [{"step": step, "sample": name, "reason": why} for name, why in left_out]
        # A full disk must not end the run; unreadable samples are also reported on the console.
        try:
            step_lines.append(self._path, rows)
        except OSError as error:
            self._say(f"warning: the samples left out in step {step} could not be recorded: {error}.")
