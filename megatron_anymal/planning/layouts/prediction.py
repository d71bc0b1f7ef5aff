"""The plan's prediction for a run as it is configured: its layout and recomputation, not the best ones."""

from __future__ import annotations

from megatron_anymal.config import RunConfig
from megatron_anymal.model.memory.recompute import candidates, cheapest_that_fits, configured, judge
from megatron_anymal.planning.layouts.enumeration import Layout
from megatron_anymal.planning.layouts.hardware import Hardware
from megatron_anymal.planning.layouts.problem import build_problem
from megatron_anymal.planning.layouts.report import mfu_of, row_of
from megatron_anymal.planning.layouts.search import Candidate, LayoutProblem
from megatron_anymal.planning.layouts.step_time import step_time
from megatron_anymal.telemetry import duration


def predict(config: RunConfig, gpu: Hardware) -> tuple[LayoutProblem, Candidate]:
    """Predict a step of a configured run, whether it fits or not.

    Args:
        config: a checked configuration with the job's nodes and devices.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: as `build_problem`.
    """
    problem, _ = build_problem(config, gpu, [])
    model = config.model
    layout = Layout(*(getattr(model, name) for name in Layout._fields))
    inputs = problem.inputs(layout)
    recompute = configured(model)
    if model.recompute_granularity == "auto":
        recompute = cheapest_that_fits(inputs.sizes, problem.memory) or candidates(inputs.sizes)[-1]
    choice = judge(inputs.sizes, recompute, problem.memory)
    return problem, Candidate(layout, choice, step_time(inputs, recompute), inputs)


def describe_prediction(config: RunConfig, gpu: Hardware) -> str:
    """Return what the plan predicts, for the report of a dry run.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: as `build_problem`.
    """
    problem, candidate = predict(config, gpu)
    row = row_of(problem, candidate)
    verdict = "fits in" if row.free_gb >= 0 else "does NOT fit in"
    return (
        f"Plan for {config.world_size:,} x {gpu.name} (trainer.gpu), {problem.work.origin}:\n"
        f"  {row.seconds:.3g}s per step, {row.tokens_per_second:,.0f} tokens/s, MFU {mfu_of(row)}, bubble "
        f"{row.bubble:.1%}, exposed communication {row.exposed:.1%}\n"
        f"  {row.memory_gb:.1f} GB on a rank of stage {candidate.choice.worst} {verdict} "
        f"{problem.memory / 1e9:.1f} GB\n"
        f"  {duration(row.days * 86400)} and {row.gpu_hours:,.0f} GPU hours until step {config.trainer.max_steps:,}\n"
        "  `anymal plan` ranks all layouts; `anymal plan --run` compares a run with this."
    )
