"""Measure one case: all sides start from the same weights and are timed in turn."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch
from anymal_side import layer_parameters
from measuring import Turns, ratio, take_turns
from runs import Run, Side, build_run, release, set_recompute, start
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from work import Amounts, Work, adapter_parameters, passes_of, spared, work_by_hand

from megatron_anymal.config import RunConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.model.operations.step import Operations, step_operations
from megatron_anymal.parallel import ParallelLayout
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.step import train_step
from megatron_anymal.train.utilization import model_costs, step_amounts, trainable_media

# Relative tolerance of loss and gradient norm between the two implementations, by precision.
TOLERANCE = {"32": (1e-4, 1e-3), "bf16": (5e-3, 5e-2), "fp8": (2e-2, 2e-1), "fp8_primary": (2e-2, 2e-1)}
NO_ROOM = "it does not fit in GPU memory"


@dataclass(frozen=True)
class Options:
    """Measurement options."""

    # Names from runs.SIDES.
    sides: tuple[str, ...]
    # One of shapes.PRECISIONS.
    precision: str
    batches: int
    rounds: int
    # Names from runs.RECOMPUTE; the first that fits is used.
    recompute: tuple[str, ...]
    # Time one side after the other, each alone on the GPU.
    apart: bool
    # Steps of the loop that measures waiting for the loader.
    loader_steps: int
    # Count the matrix products of each side once with torch's counter, which supports CPU kernels.
    count: bool


@dataclass
class Timed:
    """Results of timing the sides of a case."""

    sides: dict[str, Side]
    turns: dict[str, Turns]
    # Side -> why it was not timed.
    left_out: dict[str, str]
    # Useful work and plan of each batch.
    work: list[Operations]
    plans: list[StepPlan]
    counted: dict[str, dict[str, float]]
    data_wait: Optional[dict[str, Any]] = None
    equality: Optional[dict[str, Any]] = None
    # Peak bytes while this trainer's run was built; 0 on CPUs.
    build_peak: int = 0
    # A side failed for a reason other than memory.
    failed: bool = False


def time_sides(config: RunConfig, layout: ParallelLayout, options: Options) -> Timed:
    """Time in turn all sides that fit in memory together, and the others one by one.

    The transformers side is not timed if its first loss and gradient norm differ from this trainer's.
    """
    timed = Timed({}, {}, {}, [], [], {})
    set_recompute(config, options.recompute[0])
    groups = [[name] for name in options.sides] if options.apart else [list(options.sides)]
    for group in groups:
        no_room = _time_group(group, config, layout, options, timed)
        release()
        if len(group) > 1:
            groups += [[name] for name in no_room]
        else:
            timed.left_out |= dict.fromkeys(no_room, NO_ROOM)
    return timed


def _time_group(
    group: Sequence[str], config: RunConfig, layout: ParallelLayout, options: Options, timed: Timed
) -> list[str]:
    """Time a group of sides together; return those that did not fit."""
    started: dict[str, Side] = {}
    run, side = _fitting(config, layout, options) if "ours" in group else (_built(config, layout, options), None)
    if run is None:
        return list(group)
    if side is not None:
        started["ours"] = side
    else:
        # This run takes no steps: only its weights and batches are used.
        run.state.optimizer, run.state.wrapped = None, []  # type: ignore[assignment]
    for name in (name for name in group if name != "ours"):
        for recompute in _of_transformers(options.recompute) if name == "huggingface" else (run.recompute,):
            side = _attempt(name, run, recompute, timed)
            if side is not None:
                started[name] = side
            if side is not None or name in timed.left_out:
                break
            release()
    timed.equality = timed.equality or equality(timed.sides | started, options.precision)
    if timed.equality and not timed.equality["equal"] and started.pop("huggingface", None):
        timed.left_out["huggingface"] = "its loss or gradient differs from this trainer's: see equality"
    timed.turns |= take_turns({name: side.step for name, side in started.items()}, options.rounds, 0)
    _note(timed, run, started, options)
    return [name for name in group if name not in started and name not in timed.left_out]


def _built(config: RunConfig, layout: ParallelLayout, options: Options) -> Optional[Run]:
    """Build a run; None if not even its weights fit."""
    try:
        return build_run(config, layout, options.batches)
    except torch.OutOfMemoryError:
        return None


def _fitting(config: RunConfig, layout: ParallelLayout, options: Options) -> tuple[Optional[Run], Optional[Side]]:
    """Build a run and this trainer's side with the least activation recomputation that fits.

    Recomputation is fixed when the layers are built. If no step fits, only the run of the last try is returned, or None
    if that does not fit either.
    """
    run: Optional[Run] = None
    for recompute in options.recompute:
        del run
        release()
        set_recompute(config, recompute)
        run = _built(config, layout, options)
        try:
            if run is not None:
                return run, start("ours", run, recompute)
        except torch.OutOfMemoryError:
            pass
    return run, None


def _of_transformers(recompute: Sequence[str]) -> list[str]:
    """The modes as transformers supports them: none or full."""
    return list(dict.fromkeys("none" if one == "none" else "full" for one in recompute))


def _attempt(name: str, run: Run, recompute: str, timed: Timed) -> Optional[Side]:
    """Start a side; None without a reason in `timed` means that it does not fit."""
    try:
        return start(name, run, recompute)
    except torch.OutOfMemoryError:
        return None
    except ModuleNotFoundError as error:
        timed.left_out[name] = f"{error.name} is not installed"
    except Exception as error:
        # A failure in another library must not discard this trainer's results.
        traceback.print_exc()
        timed.left_out[name], timed.failed = f"it failed ({type(error).__name__}: {error})", True
    return None


def _note(timed: Timed, run: Run, started: dict[str, Side], options: Options) -> None:
    """Record everything that needs the live sides, then release them."""
    plans = [plan for plan, _ in run.batches]
    timed.plans, timed.work = plans, [useful_work(run.state, plan) for plan in plans]
    if options.count:
        timed.counted |= {
            name: _counted(name, side, run)
            for name, side in started.items()
            # Not with torch's checkpointing, which skips an unspecified part of the recomputation.
            if name != "huggingface" or side.recompute == "none"
        }
    if "ours" in started:
        timed.data_wait = data_wait(run.state, options.loader_steps)
        timed.build_peak = run.build_peak
    for name, side in started.items():
        # The step closures hold the memory.
        side.step = _gone
        timed.sides[name] = side


def _gone(number: int) -> None:
    raise RuntimeError("this side's memory was released")


def useful_work(state: TrainState, plan: StepPlan) -> Operations:
    """Operations that a step needs, counted as a run counts them for its MFU; in DPO with the reference."""
    media, reference = trainable_media(state.config.model), state.config.job == "dpo"
    return step_operations(model_costs(state), step_amounts(plan, media, reference=reference))


def _work(state: TrainState, amounts: Amounts, adapters: float, encodings: int) -> Work:
    section = state.config.model.modalities["image"].projector
    passes = passes_of(state.config.job, encodings)
    return work_by_hand(state.llama, section, state.models[0].encoders["image"], amounts, passes, adapters)


def _counted(name: str, side: Side, run: Run) -> dict[str, float]:
    """FLOPs of the matrix products of a side's step, without attention: as counted by torch, and analytically.

    The analytic number includes padding and recomputation as the side does it; all sides except this trainer's run the
    last layer and the output layer at every position.
    """
    with FlopCounterMode(display=False) as counter:
        side.step(0)
    state, plan = run.state, run.batches[0][0]
    padded = plan.padded_length * len(plan.micro_batches[0])
    head_rows = int(plan.targets.sum()) if name == "ours" else padded
    amounts = Amounts(padded, head_rows, int(plan.media.pieces.sum()))
    r = state.config.model.lora.r
    adapters = adapter_parameters(state.llama, r, joined=name == "ours")
    # This trainer runs the encoder again for the DPO reference.
    work = _work(state, amounts, adapters, encodings=2 if name == "ours" and state.config.job == "dpo" else 1)
    by_hand = {"media": work.media, "bare": work.layers + work.head}.get(name, work.total)
    if name in ("ours", "bare"):
        by_hand += computed_twice(state.llama, side.recompute) * padded
    if name == "ours" and not state.config.model.fp8:
        by_hand -= spared(state.llama, r, passes_of(state.config.job, 1), side.recompute, padded - head_rows)
    if name == "huggingface" and state.config.job == "dpo":
        by_hand -= first_input_gradient(state, padded)
    return {"counted": float(sum(counter.get_flop_counts()["Global"].values())), "by_hand": by_hand}


def computed_twice(hf: LlamaConfig, recompute: str) -> float:
    """Recomputed FLOPs per token in megatron-core, without adapters."""
    mlp = 3 * hf.hidden_size * hf.intermediate_size
    layer = layer_parameters(
        hf.hidden_size, hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim, hf.intermediate_size
    )
    return 2.0 * hf.num_hidden_layers * {"none": 0, "mlp": mlp, "full": layer}[recompute]


def first_input_gradient(state: TrainState, tokens: int) -> float:
    """FLOPs that transformers saves if nothing before the Llama trains: the gradient of the first layer's input through
    query, key, value and their adapters."""
    hf, r = state.llama, state.config.model.lora.r
    outputs = (hf.num_attention_heads + 2 * hf.num_key_value_heads) * hf.head_dim
    return 2.0 * tokens * hf.hidden_size * (outputs + 3 * r)


def data_wait(state: TrainState, count: int) -> dict[str, Any]:
    """Measure the share of time that training waits for its loader, with worker processes as in a run."""
    data, settings = state.train_data, state.config.data
    batches = steps(
        data.planner,
        data.reader,
        replica=0,
        start=0,
        stop=count + 1,
        num_workers=settings.num_workers,
        prefetch_steps=settings.prefetch_steps,
    )
    # Exclude the startup of the workers.
    train_step(state, *next(batches))
    waited, total = [], []
    for _ in range(count):
        begun = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - begun)
        train_step(state, *batch)
        torch.cuda.synchronize()
        total.append(time.perf_counter() - begun)
    return {
        "workers": settings.num_workers,
        "steps": count,
        "waited_seconds": waited,
        "seconds": total,
        "share": sum(waited) / sum(total),
    }


def summary(timed: Timed, limits: dict[str, Any]) -> dict[str, Any]:
    """Results of a case: sizes, numbers of each side, and ratios between sides."""
    tokens = [int(plan.documents.sum()) for plan in timed.plans]
    operations = [work.needed for work in timed.work]
    sides = {name: _side(name, timed, tokens, operations, limits) for name in timed.sides}
    return {
        "batches": [_sizes(plan) for plan in timed.plans],
        "work": [_parts(work) for work in timed.work],
        "sides": sides,
        "left_out_sides": timed.left_out,
        "data_wait": timed.data_wait,
        "counted": timed.counted,
        "equality": timed.equality,
        "ratios": _ratios(timed.turns),
    }


def _parts(work: Operations) -> dict[str, float]:
    """Needed operations by part, and in total."""
    again = ("encoding_again", "repeated")
    return {**{part: count for part, count in asdict(work).items() if part not in again}, "total": work.needed}


def _sizes(plan: StepPlan) -> dict[str, int]:
    packs = len(plan.micro_batches[0])
    return {
        "samples": len(plan.targets),
        "packs": packs,
        "tokens": int(plan.documents.sum()),
        "padded_tokens": plan.padded_length * packs,
        "targets": int(plan.targets.sum()),
        "images": int(plan.media.pieces.sum()),
    }


def _side(
    name: str, timed: Timed, tokens: Sequence[int], operations: Sequence[float], limits: dict[str, Any]
) -> dict[str, Any]:
    seconds, side = timed.turns[name].wall, timed.sides[name]
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    row: dict[str, Any] = {
        "seconds": {"median": median, "lower": lower, "upper": upper, "raw": seconds},
        "recompute": side.recompute,
        "peak_memory_bytes": side.peak,
    }
    if name == "ours":
        row["build_peak_memory_bytes"] = timed.build_peak or None
    if name in ("ours", "huggingface"):
        rate = _per_second(operations, seconds)
        row["tokens_per_second"] = _per_second(tokens, seconds)
        row["operations_per_second"] = rate
        row["share_of_bf16_rate"] = rate / limits["bf16"]
        row["share_of_fp8_rate"] = rate / limits["fp8"] if limits["fp8"] else None
    return row


def _per_second(amounts: Sequence[float], seconds: Sequence[float]) -> float:
    """Median rate over the rounds; round n used batch n (modulo their number), and batches differ slightly."""
    return statistics.median(amounts[number % len(amounts)] / one for number, one in enumerate(seconds))


def _ratios(turns: dict[str, Turns]) -> dict[str, Any]:
    """Ratios of seconds: transformers to ours, ours to the floor, and ours to the floor plus the media work."""
    ratios: dict[str, Any] = {}
    if "ours" not in turns:
        return ratios
    ours = turns["ours"].wall
    if "huggingface" in turns:
        ratios["huggingface_over_ours"] = asdict(ratio(turns["huggingface"].wall, ours))
    if "bare" in turns:
        ratios["ours_over_bare"] = asdict(ratio(ours, turns["bare"].wall))
    if {"bare", "media"} <= turns.keys():
        floor = [a + b for a, b in zip(turns["bare"].wall, turns["media"].wall)]
        ratios["ours_over_bare_and_media"] = asdict(ratio(ours, floor))
    return ratios


def equality(sides: dict[str, Side], precision: str) -> Optional[dict[str, Any]]:
    """Compare loss and gradient norm of this trainer and transformers for the first batch."""
    if not {"ours", "huggingface"} <= sides.keys():
        return None
    ours, theirs = sides["ours"].first, sides["huggingface"].first
    assert ours is not None and theirs is not None
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs)]
    return {
        "loss": {"ours": ours[0], "huggingface": theirs[0], "apart": apart[0]},
        "gradient_norm": {"ours": ours[1], "huggingface": theirs[1], "apart": apart[1]},
        "tolerance": TOLERANCE[precision],
        "equal": all(a <= bar for a, bar in zip(apart, TOLERANCE[precision])),
    }
