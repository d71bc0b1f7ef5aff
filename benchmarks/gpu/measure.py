"""One case measured: all sides from the same weights, in turn."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import numpy as np
import torch
from anymal_side import layer_parameters
from measuring import Turns, ratio, take_turns
from runs import Run, Side, build_run, release, set_recompute, start
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from work import Amounts, Work, adapter_parameters, passes_of, work_by_hand

from megatron_anymal.config import RunConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.data.planner import StepPlan
from megatron_anymal.parallel import ParallelLayout
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.step import train_step

# How far loss and gradient norm of the two implementations may lie apart, by precision.
TOLERANCE = {"32": (1e-4, 1e-3), "bf16": (5e-3, 5e-2), "fp8": (2e-2, 2e-1), "fp8_primary": (2e-2, 2e-1)}
NO_ROOM = "it does not fit the card's memory"


@dataclass(frozen=True)
class Options:
    """How to measure."""

    # Of runs.SIDES.
    sides: tuple[str, ...]
    # Of shapes.PRECISIONS.
    precision: str
    batches: int
    rounds: int
    # Of runs.RECOMPUTE: the first that fits is taken.
    recompute: tuple[str, ...]
    # One side after the other, each alone on the card.
    apart: bool
    # Steps of the loop that waits for the loader.
    loader_steps: int
    # Count each side's products once with torch's counter, which knows the kernels of CPUs.
    count: bool


@dataclass
class Timed:
    """What came of a case's sides."""

    sides: dict[str, Side]
    turns: dict[str, Turns]
    # Side -> why it was not timed.
    left_out: dict[str, str]
    # The useful work of each batch, and its plan.
    work: list[Work]
    plans: list[StepPlan]
    counted: dict[str, dict[str, float]]
    data_wait: Optional[dict[str, Any]] = None
    equality: Optional[dict[str, Any]] = None
    # Bytes while this trainer's run was built; 0 on CPUs.
    build_peak: int = 0
    # A side failed, which is no want of room.
    failed: bool = False


def time_sides(config: RunConfig, layout: ParallelLayout, options: Options) -> Timed:
    """Time all sides in turn where they fit together, and one by one those that did not.

    Transformers' side is not timed where its first loss and gradient norm are not this trainer's.
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
    """Returns the sides that had no room."""
    started: dict[str, Side] = {}
    run, side = _fitting(config, layout, options) if "ours" in group else (_built(config, layout, options), None)
    if run is None:
        return list(group)
    if side is not None:
        started["ours"] = side
    else:
        # Nothing of it is stepped: only its weights and batches are used.
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
        timed.left_out["huggingface"] = "its loss or gradient is not this trainer's: see equality"
    timed.turns |= take_turns({name: side.step for name, side in started.items()}, options.rounds, 0)
    _note(timed, run, started, options)
    return [name for name in group if name not in started and name not in timed.left_out]


def _built(config: RunConfig, layout: ParallelLayout, options: Options) -> Optional[Run]:
    """A run, or None where not even its weights have room."""
    try:
        return build_run(config, layout, options.batches)
    except torch.OutOfMemoryError:
        return None


def _fitting(config: RunConfig, layout: ParallelLayout, options: Options) -> tuple[Optional[Run], Optional[Side]]:
    """A run and this trainer's side with as little computed twice as fits; the layers are told when they are built.

    Where no step fits, the last try's run alone, or where that does not fit either, nothing.
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
    """What of it transformers can do: none or full."""
    return list(dict.fromkeys("none" if one == "none" else "full" for one in recompute))


def _attempt(name: str, run: Run, recompute: str, timed: Timed) -> Optional[Side]:
    """A side; without it and a reason in `timed` it has no room."""
    try:
        return start(name, run, recompute)
    except torch.OutOfMemoryError:
        return None
    except ModuleNotFoundError as error:
        timed.left_out[name] = f"{error.name} is not installed"
    except Exception as error:
        # Another library's fault must not cost this trainer's numbers.
        traceback.print_exc()
        timed.left_out[name], timed.failed = f"it failed ({type(error).__name__}: {error})", True
    return None


def _note(timed: Timed, run: Run, started: dict[str, Side], options: Options) -> None:
    """What must be learned while the sides are there."""
    plans = [plan for plan, _ in run.batches]
    timed.plans, timed.work = plans, [useful_work(run.state, plan) for plan in plans]
    if options.count:
        timed.counted |= {
            name: _counted(name, side, run)
            for name, side in started.items()
            # How much of a layer torch's checkpointing leaves out at its end is no matter of ours.
            if name != "huggingface" or side.recompute == "none"
        }
    if "ours" in started:
        timed.data_wait = data_wait(run.state, options.loader_steps)
        timed.build_peak = run.build_peak
    for name, side in started.items():
        # The steps hold the memory.
        side.step = _gone
        timed.sides[name] = side


def _gone(number: int) -> None:
    raise RuntimeError("this side's memory was given back")


def useful_work(state: TrainState, plan: StepPlan) -> Work:
    """What a step must compute: nothing for padding, and the head for targets alone."""
    amounts = Amounts(
        tokens=int(plan.documents.sum()),
        head_rows=int(plan.targets.sum()),
        squares=int(np.square(plan.documents).sum()),
        pieces=_pieces(plan),
    )
    adapters = adapter_parameters(state.llama, state.config.model.lora.r)
    return _work(state, amounts, adapters, encodings=1)


def _pieces(plan: StepPlan) -> int:
    return sum(item.pieces for items in plan.media for item in items)


def _work(state: TrainState, amounts: Amounts, adapters: float, encodings: int) -> Work:
    section = state.config.model.modalities["image"].projector
    passes = passes_of(state.config.job, encodings)
    return work_by_hand(state.llama, section, state.models[0].encoders["image"], amounts, passes, adapters)


def _counted(name: str, side: Side, run: Run) -> dict[str, float]:
    """The matrix products of a side's step, attention aside: as torch counts them, and by hand.

    By hand are those that the side computes, padding and what it computes twice included; every side but this trainer's
    runs its head everywhere.
    """
    with FlopCounterMode(display=False) as counter:
        side.step(0)
    state, plan = run.state, run.batches[0][0]
    padded = plan.padded_length * len(plan.micro_batches[0])
    head_rows = int(plan.targets.sum()) if name == "ours" else padded
    amounts = Amounts(padded, head_rows, 0, _pieces(plan))
    r = state.config.model.lora.r
    adapters = adapter_parameters(state.llama, r, joined=name == "ours")
    # This trainer encodes once more for DPO's reference.
    work = _work(state, amounts, adapters, encodings=2 if name == "ours" and state.config.job == "dpo" else 1)
    by_hand = {"media": work.media.products, "bare": work.layers + work.head}.get(name, work.products)
    if name in ("ours", "bare"):
        by_hand += computed_twice(state.llama, side.recompute) * padded
    if name == "huggingface" and state.config.job == "dpo":
        by_hand -= first_input_gradient(state, padded)
    return {"counted": float(sum(counter.get_flop_counts()["Global"].values())), "by_hand": by_hand}


def computed_twice(hf: LlamaConfig, recompute: str) -> float:
    """Of a token, by megatron-core without adapters."""
    mlp = 3 * hf.hidden_size * hf.intermediate_size
    layer = layer_parameters(
        hf.hidden_size, hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim, hf.intermediate_size
    )
    return 2.0 * hf.num_hidden_layers * {"none": 0, "mlp": mlp, "full": layer}[recompute]


def first_input_gradient(state: TrainState, tokens: int) -> float:
    """What transformers need not compute where nothing before the Llama learns: the gradient of the first layer's input
    through query, key, value and their adapters."""
    hf, r = state.llama, state.config.model.lora.r
    outputs = (hf.num_attention_heads + 2 * hf.num_key_value_heads) * hf.head_dim
    return 2.0 * tokens * hf.hidden_size * (outputs + 3 * r)


def data_wait(state: TrainState, count: int) -> dict[str, Any]:
    """The share of time that training waits for its loader, with worker processes as in a run."""
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
    # The workers' start is no part of it.
    train_step(state, *next(batches))
    waited, all_of_it = [], []
    for _ in range(count):
        begun = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - begun)
        train_step(state, *batch)
        torch.cuda.synchronize()
        all_of_it.append(time.perf_counter() - begun)
    return {
        "workers": settings.num_workers,
        "steps": count,
        "waited_seconds": waited,
        "seconds": all_of_it,
        "share": sum(waited) / sum(all_of_it),
    }


def summary(timed: Timed, limits: dict[str, Any]) -> dict[str, Any]:
    """A case's results: sizes, each side's numbers, ratios between them."""
    tokens = [int(plan.documents.sum()) for plan in timed.plans]
    operations = [work.total for work in timed.work]
    sides = {name: _side(name, timed, tokens, operations, limits) for name in timed.sides}
    return {
        "batches": [_sizes(plan) for plan in timed.plans],
        "work": [{**asdict(work), "total": work.total} for work in timed.work],
        "sides": sides,
        "left_out_sides": timed.left_out,
        "data_wait": timed.data_wait,
        "counted": timed.counted,
        "equality": timed.equality,
        "ratios": _ratios(timed.turns),
    }


def _sizes(plan: StepPlan) -> dict[str, int]:
    packs = len(plan.micro_batches[0])
    return {
        "samples": len(plan.targets),
        "packs": packs,
        "tokens": int(plan.documents.sum()),
        "padded_tokens": plan.padded_length * packs,
        "targets": int(plan.targets.sum()),
        "images": _pieces(plan),
    }


def _side(
    name: str, timed: Timed, tokens: Sequence[int], operations: Sequence[float], limits: dict[str, Any]
) -> dict[str, Any]:
    seconds, side = timed.turns[name].wall, timed.sides[name]
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    found: dict[str, Any] = {
        "seconds": {"median": median, "lower": lower, "upper": upper, "raw": seconds},
        "recompute": side.recompute,
        "peak_memory_bytes": side.peak,
    }
    if name == "ours":
        found["build_peak_memory_bytes"] = timed.build_peak or None
    if name in ("ours", "huggingface"):
        rate = _per_second(operations, seconds)
        found["tokens_per_second"] = _per_second(tokens, seconds)
        found["operations_per_second"] = rate
        found["share_of_bf16_rate"] = rate / limits["bf16"]
        found["share_of_fp8_rate"] = rate / limits["fp8"] if limits["fp8"] else None
    return found


def _per_second(amounts: Sequence[float], seconds: Sequence[float]) -> float:
    """The median over the rounds; round number n took batch n, and batches differ a little."""
    return statistics.median(amounts[number % len(amounts)] / one for number, one in enumerate(seconds))


def _ratios(turns: dict[str, Turns]) -> dict[str, Any]:
    """How seconds compare: transformers' over ours, ours over the floor, and over the floor with the media's work."""
    found: dict[str, Any] = {}
    if "ours" not in turns:
        return found
    ours = turns["ours"].wall
    if "huggingface" in turns:
        found["huggingface_over_ours"] = asdict(ratio(turns["huggingface"].wall, ours))
    if "bare" in turns:
        found["ours_over_bare"] = asdict(ratio(ours, turns["bare"].wall))
    if {"bare", "media"} <= turns.keys():
        floor = [a + b for a, b in zip(turns["bare"].wall, turns["media"].wall)]
        found["ours_over_bare_and_media"] = asdict(ratio(ours, floor))
    return found


def equality(sides: dict[str, Side], precision: str) -> Optional[dict[str, Any]]:
    """Loss and gradient norm of this trainer and transformers for the first batch, and whether they are the same."""
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
