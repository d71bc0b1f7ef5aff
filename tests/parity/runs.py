"""One run of the engine under one layout, and how far it is from another run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import run_ranks

import megatron_anymal.model.build as model_build
from megatron_anymal.config import AnyMALConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.model.weights import gather_weights, list_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.step import train_step
from parity.layouts import Layout
from parity.reference import Trace


@dataclass(frozen=True)
class EngineRun:
    """What the engine did, and what it started from."""

    trace: Trace
    # All whole weights before the first step, and the names of those that train.
    start: dict[str, np.ndarray]
    trainable: frozenset[str]


@dataclass(frozen=True)
class Difference:
    """How far a run is from its reference, over all steps.

    Attributes:
        loss: largest difference of a step's loss, relative to it.
        gradient: largest norm of the difference of one parameter's gradient, relative to that gradient's norm.
        weight: largest norm of the difference of one parameter after the last step, relative to how far it moved.
        where: the parameter and the step of `gradient`.
    """

    loss: float
    gradient: float
    weight: float
    where: str


def run_layout(
    base: AnyMALConfig, layout: Layout, count: int, before: Callable[[], None] | None = None, timeout: float = 240.0
) -> EngineRun:
    """Train `count` steps under a layout, in processes of their own.

    Args:
        before: called in each process first; the tests plant bugs with it.
    """
    config = layout.applied(base)
    config.model.language_model.freeze = layout.trains != "full"
    config.model.language_model.config["tie_word_embeddings"] = layout.tied_head
    return run_ranks(layout.processes, _run, config, layout.trains == "partial", count, before, timeout=timeout)[0]


def _run(config: AnyMALConfig, partial: bool, count: int, before: Callable[[], None] | None) -> EngineRun | None:
    if partial:
        _train_a_part()
    if before is not None:
        before()
    state = build(config, initialize(config))
    start = gather_weights(state.models)
    names = _all_of({w.name for m in state.models for w in list_weights(m) if w.parameter.requires_grad})
    losses, gradients = [], []
    update: Any = state.optimizer.step
    state.optimizer.step = lambda: (gradients.append(whole_gradients(state)), update())[1]
    data = state.train_data
    replica = state.layout.data_rank
    for plan, batches in steps(
        data.planner, data.reader, replica=replica, start=0, stop=count, num_workers=0, prefetch_steps=1
    ):
        losses.append(train_step(state, plan, batches).loss)
    state.settle()
    end = gather_weights(state.models)
    if start is None or end is None:
        return None
    trace = Trace(losses, [g for g in gradients if g is not None], {name: end[name].numpy() for name in names})
    return EngineRun(trace, {name: value.numpy() for name, value in start.items()}, frozenset(names))


def _train_a_part() -> None:
    """Let the queries, keys and values and the norms before them train, as an adapter method would."""
    freeze = model_build._freeze

    def freeze_most(model: Any, config: AnyMALConfig) -> None:
        freeze(model, config)
        for name, parameter in model.language_model.named_parameters():
            if "linear_qkv" in name or "input_layernorm" in name:
                parameter.requires_grad_(True)

    model_build._freeze = freeze_most


def _all_of(names: set[str]) -> set[str]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, names)
    return set().union(*parts)


def whole_gradients(state: TrainState) -> dict[str, np.ndarray] | None:
    """Every trainable weight's reduced gradient under its whole name, on rank 0 (None elsewhere). Collective."""
    for wrapped in state.wrapped:
        for group in wrapped.bucket_groups if state.config.model.ddp.use_distributed_optimizer else ():
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                # After the reduction a rank has the sums of its own part of the bucket.
                parts = list(bucket.grad_data.chunk(ranks.size()))
                found = [torch.empty_like(p) for p in parts]
                dist.all_gather(found, parts[ranks.rank()].clone(), group=ranks)
                bucket.grad_data.copy_(torch.cat(found))
    mine = {}
    for model in state.models:
        for weight in list_weights(model):
            if weight.parameter.requires_grad:
                whole = weight.gather(weight.parameter.main_grad)
                mine[weight.name] = whole.cpu().numpy().copy()
    speaks = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine if speaks else {}, gathered, dst=0)
    return None if gathered is None else {name: value for part in gathered for name, value in part.items()}


def compare(run: EngineRun, reference: Trace) -> Difference:
    """See Difference.

    Raises:
        AssertionError: they do not train the same weights or the same number of steps.
    """
    trace = run.trace
    assert len(trace.losses) == len(reference.losses)
    assert trace.weights.keys() == reference.weights.keys()
    loss = max(abs(a - b) / abs(b) for a, b in zip(trace.losses, reference.losses))
    worst, where = 0.0, ""
    for step, (mine, theirs) in enumerate(zip(trace.gradients, reference.gradients)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            difference = _relative(mine[name] - value, value)
            if not difference <= worst:
                worst, where = difference, f"{name}, step {step + 1}"
    weight = max(
        _relative(trace.weights[name] - value, value - run.start[name]) for name, value in reference.weights.items()
    )
    return Difference(loss, worst, weight, where)


def _relative(difference: np.ndarray, whole: np.ndarray) -> float:
    norm = float(np.linalg.norm(whole.astype(np.float64)))
    size = float(np.linalg.norm(difference.astype(np.float64)))
    return size / norm if norm else (0.0 if size == 0.0 else float("inf"))


def fingerprint(weights: dict[str, np.ndarray]) -> str:
    """A hash of whole weights, to see that two runs start alike."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].tobytes())
    return digest.hexdigest()
