"""What a run has measured, against what the plan predicts for it, term by term."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_anymal.checkpoint.store import committed, read_manifest
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.parsing import from_dict
from megatron_anymal.planning.layouts.hardware import Hardware
from megatron_anymal.planning.layouts.prediction import predict
from megatron_anymal.planning.layouts.report import LayoutRow, mfu_of, row_of
from megatron_anymal.planning.layouts.step_time import StepTime
from megatron_anymal.processes.process_memory import GIB

_TITLES = {
    "forward": "forward passes",
    "backward": "backward passes",
    "gradients": "gradients (exposed)",
    "update": "optimizer and weights",
    "idle": "bubble, messages, host",
    "data": "waiting for data",
}


@dataclass(frozen=True)
class Terms:
    """Seconds of a step by what they go into, as means over the ranks.

    Attributes:
        forward: forward passes, with their tensor- and context-parallel communication.
        backward: backward passes, likewise, with recomputation.
        gradients: reduction of the gradients that no pass hides.
        update: optimizer and gathering of the updated weights.
        idle: the rest: waits for other pipeline stages and for messages, and the host.
        data: waits for the loader, which the plan takes to be none.
    """

    forward: float
    backward: float
    gradients: float
    update: float
    idle: float
    data: float = 0.0

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return float(sum(astuple(self)))


@dataclass(frozen=True)
class MeasuredMedians:
    """Medians over a run's log lines.

    Attributes:
        terms: of a step.
        memory: bytes that tensors took at most on the GPU with the most; 0 on a CPU.
        lines: number of log lines.
        rate: operations per second and GPU that the steps needed; 0 in runs of earlier versions.
    """

    terms: Terms
    memory: float
    lines: int
    rate: float = 0.0


def predicted_terms(step: StepTime) -> Terms:
    """Return the terms of a predicted step."""
    forward, gradients = statistics.fmean(step.forward), statistics.fmean(step.reductions)
    backward = statistics.fmean(step.pipeline.busy) - forward
    idle = step.seconds - forward - backward - gradients - step.update
    return Terms(forward, backward, gradients, step.update, idle)


def measured_terms(run_dir: Path) -> MeasuredMedians:
    """Read the terms of a run from its metrics.jsonl; the first line, with its warm-up, is left out if there are more.

    Raises:
        ConfigError: the folder has no such lines.
    """
    rows = _rows(run_dir / "metrics.jsonl")
    if not rows:
        raise ConfigError(
            f"--run: {str(run_dir)!r} has no times of steps in metrics.jsonl. Name the folder of a run that has logged "
            "a step (exp_manager.explicit_log_dir)."
        )
    kept = rows[1:] or rows

    def median(name: str) -> float:
        return float(statistics.median(row[name] for row in kept))

    terms = Terms(
        median("forward_seconds"),
        median("backward_seconds"),
        median("gradient_seconds"),
        median("update_seconds"),
        median("idle_seconds"),
        float(statistics.median(row["data_wait_share"] * row["step_seconds"] for row in kept)),
    )
    rate = 1e12 * statistics.median(row.get("tflops_per_gpu", 0.0) for row in kept)
    return MeasuredMedians(terms, max(row["device_memory_gib"] for row in kept) * GIB, len(kept), rate)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of log steps; partial lines and those of validations are left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "forward_seconds" in row:
            rows.append(row)
    return rows


def config_of_run(run_dir: Path) -> RunConfig:
    """Return the configuration of a run, from its newest checkpoint.

    Raises:
        ConfigError: there is no such folder, or no checkpoint in it.
        CheckpointError: the checkpoint's manifest is damaged.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"--run: there is no folder {str(run_dir)!r}. Name a run's folder.")
    checkpoints = committed(run_dir / "checkpoints")
    if not checkpoints:
        raise ConfigError(
            f"--run: {str(run_dir)!r} has no checkpoint yet, and so no record of the run's configuration. Wait for the "
            "first one (exp_manager.checkpoint.every_n_train_steps)."
        )
    return from_dict(read_manifest(checkpoints[-1]).config)


def compare(config: RunConfig, gpu: Hardware, run_dir: Path) -> str:
    """Return the comparison of a run with its prediction, as text.

    Args:
        config: the run's configuration.

    Raises:
        ConfigError: the folder has no times of steps.
        DataError, CheckpointError, StorageError: as `predict`.
    """
    measured = measured_terms(run_dir)
    problem, candidate = predict(config, gpu)
    predicted = predicted_terms(candidate.step)
    rows = [("step", predicted.step, measured.terms.step)]
    rows += [
        (f"  {_TITLES[f.name]}", getattr(predicted, f.name), getattr(measured.terms, f.name)) for f in fields(Terms)
    ]
    choice = candidate.choice
    title = f"Against the plan for {config.world_size:,} x {gpu.name}, {candidate.layout}, recompute {choice.recompute}"
    most = choice.held[choice.worst].total
    return "\n".join(
        [
            f"{title} (medians of {measured.lines} log line(s)):",
            *_table(rows),
            _memory(most, measured.memory),
            *_operations(row_of(problem, candidate), gpu, measured.rate),
            _most_off(predicted, measured.terms),
        ]
    )


def compare_or_warn(config: RunConfig, gpu: Hardware) -> str:
    """Return the comparison of a run that has just ended, or a warning: nothing here may fail the run."""
    try:
        return compare(config, gpu, config.run_dir)
    except (OSError, ValueError) as error:
        return f"warning: the run could not be compared with its plan: {error}"


def _table(rows: Sequence[tuple[str, float, float]]) -> list[str]:
    whole = rows[0]
    lines = [f"{'':<26}{'predicted':>11}{'measured':>20}"]
    for name, predicted, measured in rows:
        shares = [f"{seconds:.3g}s {seconds / all_:>6.1%}" for seconds, all_ in zip((predicted, measured), whole[1:])]
        lines.append(f"{name:<26}{shares[0]:>16}{shares[1]:>20}")
    return lines


def _memory(predicted: float, measured: float) -> str:
    if not measured:
        return f"memory: {predicted / 1e9:.2f} GB predicted, not measured on a CPU"
    off = measured / predicted - 1
    return f"memory: {predicted / 1e9:.2f} GB predicted, {measured / 1e9:.2f} GB measured ({off:+.1%})"


def _operations(predicted: LayoutRow, gpu: Hardware, measured: float) -> list[str]:
    if not measured:
        return []
    peak = gpu.peak(predicted.number_format)
    return [
        f"operations: {1e-12 * predicted.mfu * peak:.3g} TFLOP/s per GPU (MFU {mfu_of(predicted)}) predicted, "
        f"{1e-12 * measured:.3g} (MFU {measured / peak:.1%}) measured"
    ]


def _most_off(predicted: Terms, measured: Terms) -> str:
    """Name the term that explains most of the difference between the steps."""
    differences = {f.name: getattr(measured, f.name) - getattr(predicted, f.name) for f in fields(Terms)}
    whole = measured.step - predicted.step
    # The one that points the same way as the whole, and furthest.
    name = max(differences, key=lambda one: differences[one] * (1 if whole >= 0 else -1))
    return (
        f"The measured step differs from the plan by {whole:+.3g}s ({measured.step / predicted.step - 1:+.1%}); "
        f"largest contribution: {_TITLES[name]}, {differences[name]:+.3g}s."
    )
