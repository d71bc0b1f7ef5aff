"""Cases of a benchmark: prepare shared data and limits, then measure one case after the other."""

from __future__ import annotations

import argparse
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymal_side import Ours
from limits import measure_limits
from measure import NO_ROOM, Options, Timed, summary, time_sides
from profiling import profiled
from report import bars
from runs import build_run, release
from samples import write_data
from shapes import Case, make_config

from megatron_anymal import backend
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.parallel import ParallelLayout, initialize

# Steps of a profile, and of the loop that measures waiting for the loader.
PROFILED_STEPS, LOADER_STEPS, DRY_LOADER_STEPS = 3, 12, 2
# Number of generated samples.
SAMPLES, DRY_SAMPLES = 1024, 64


@dataclass(frozen=True)
class Prepared:
    """Data and limits shared by all cases of a benchmark."""

    folder: Path
    # Mean LLM tokens per sample.
    mean_tokens: float
    limits: dict[str, Any]


def prepare(folder: Path, case: Case) -> Prepared:
    """Write data for cases like this one and measure the GPU's limits."""
    mean = write_data(folder, case, DRY_SAMPLES if case.dry_run else SAMPLES)
    return Prepared(folder, mean, measure_limits(backend.device(), dry_run=case.dry_run))


def measure_case(case: Case, arguments: argparse.Namespace, data: Prepared, left_out: dict[str, str]) -> dict[str, Any]:
    """Return the results of a case, or the reason why it was skipped under "left_out".

    Args:
        left_out: side -> why the benchmark does not include it.
    """
    config = make_config(case, data.folder, data.mean_tokens)
    try:
        backend.check_backend(config.model, config.trainer.precision)
    except ConfigError as error:
        return {"left_out": str(error)}
    layout = initialize(config)
    options = Options(
        sides=tuple(arguments.sides),
        precision=case.precision,
        batches=arguments.batches,
        rounds=arguments.rounds,
        recompute=tuple(arguments.recompute),
        apart=arguments.apart,
        loader_steps=DRY_LOADER_STEPS if case.dry_run else LOADER_STEPS,
        count=case.dry_run,
    )
    results: dict[str, Any] = {}
    try:
        timed = time_sides(config, layout, options)
        results = _results(case, timed, data.limits, left_out)
        missed = any(row["met"] is False for row in results.get("bars", ()))
        if "ours" in timed.sides and (arguments.profile or missed):
            results["profile"] = _profile(config, layout, options.batches)
    except Exception as error:
        # GPU time is expensive: keep the results so far and continue with the other cases.
        traceback.print_exc()
        results = {**(results or {"left_out": f"it failed ({type(error).__name__}: {error})"}), "failed": True}
    release()
    return results


def _results(case: Case, timed: Timed, limits: dict[str, Any], left_out: dict[str, str]) -> dict[str, Any]:
    if not timed.sides:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in timed.left_out.items())
        return {"left_out": reasons, "failed": timed.failed}
    timed.left_out |= left_out
    results = summary(timed, limits)
    results["bars"], results["failed"] = bars(case, results), timed.failed
    results["fits"] = "ours" in timed.sides or (False if timed.left_out.get("ours") == NO_ROOM else None)
    return results


def _profile(config: RunConfig, layout: ParallelLayout, batches: int) -> dict[str, Any]:
    run = build_run(config, layout, batches)
    return profiled(Ours(run.state, run.batches).step, PROFILED_STEPS)
