"""Run the engine under one layout, and measure its difference from the reference."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import run_ranks

import megatron_anymal.model.build as model_build
from megatron_anymal.config import LoraConfig, ModelConfig, RunConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.model.unsharded_weights import gather_weights, hash_weights, list_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.restore import read_reference
from megatron_anymal.train.step import train_step
from parity.discrete import SECTIONS, codes_in_documents
from parity.layouts import Layout
from parity.reference import Trace

# Relative tolerance for losses and whole gradients, in fp32.
TOLERANCE = 1e-5
# For single parameters, whose gradients can be sums of large terms that nearly cancel.
PARAMETER_TOLERANCE = 1e-4


@dataclass(frozen=True)
class EngineRun:
    """Record of a run of the engine, and the weights it started from."""

    trace: Trace
    # All unsharded weights before the first step, and names of the trainable ones.
    start: dict[str, np.ndarray]
    trainable: frozenset[str]
    # The objective's metrics of each step.
    measures: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Difference:
    """Largest differences between a run and its reference over all steps.

    Attributes:
        loss: difference of a step's loss, relative to the loss.
        gradient: norm of the difference of a step's gradient, relative to the gradient's norm.
        parameter: the same for a single parameter, relative to the largest norm of its gradient in any step (if the
            gradient cancels in one step, only rounding remains).
        weight: norm of the difference of a parameter after the last step, relative to the parameter's norm.
        where: parameter and step at which `parameter` was measured.
    """

    loss: float
    gradient: float
    parameter: float
    weight: float
    where: str

    @property
    def allowed(self) -> bool:
        """Whether rounding of fp32 sums in another order explains the difference. False for NaN."""
        return (
            self.loss <= TOLERANCE
            and self.gradient <= TOLERANCE
            and self.parameter <= PARAMETER_TOLERANCE
            and self.weight <= PARAMETER_TOLERANCE
        )


def run_layout(
    base: RunConfig, layout: Layout, count: int, before: Callable[[], None] | None = None, timeout: float = 240.0
) -> EngineRun:
    """Train `count` steps under a layout, in new processes.

    Args:
        before: called first in each process, to plant a bug.
    """
    config = configured(base, layout)
    with TemporaryDirectory() as config.exp_manager.explicit_log_dir:
        return run_ranks(layout.processes, _run, config, layout.trains == "partial", count, before, timeout=timeout)[0]


def configured(base: RunConfig, layout: Layout) -> RunConfig:
    """Return a copy of `base` for a run under a layout, including the choice of trainable weights."""
    config = layout.applied(base)
    config.model.language_model.freeze = layout.trains != "full"
    if layout.trains == "lora":
        config.model.lora = LoraConfig(r=2, alpha=8.0)
    for modality in config.model.modalities.values() if layout.job == "dpo" else ():
        modality.encoder.freeze = modality.projector.freeze = True
    config.model.language_model.config["tie_word_embeddings"] = layout.tied_head
    if layout.rows:
        config.model.discrete, config.model.discrete_rows = dict(SECTIONS), layout.rows
    return config


def _run(config: RunConfig, partial: bool, count: int, before: Callable[[], None] | None) -> EngineRun | None:
    if partial:
        _train_a_part()
    if before is not None:
        before()
    with codes_in_documents(config.model):
        return _train(config, count)


def _train(config: RunConfig, count: int) -> EngineRun | None:
    state = build(config, initialize(config))
    if config.job == "dpo":
        with redirect_stdout(io.StringIO()):
            base_hash = hash_weights(state.models, "language_model.")
            read_reference(state, base_hash, config.run_dir, print)
    start = gather_weights(state.models)
    names = _all_of({w.name for m in state.models for w in list_weights(m) if w.parameter.requires_grad})
    losses, measures, gradients = [], [], []
    update: Any = state.optimizer.step
    state.optimizer.step = lambda: (gradients.append(whole_gradients(state)), update())[1]
    data = state.train_data
    replica = state.layout.data_rank
    for plan, batches in steps(
        data.planner, data.reader, replica=replica, start=0, stop=count, num_workers=0, prefetch_steps=1
    ):
        result = train_step(state, plan, batches)
        losses.append(result.loss)
        measures.append(result.measures)
    state.wait_for_param_gather()
    end = gather_weights(state.models)
    if start is None or end is None:
        return None
    trace = Trace(losses, [g for g in gradients if g is not None], {name: end[name].numpy() for name in names})
    return EngineRun(trace, {name: value.numpy() for name, value in start.items()}, frozenset(names), tuple(measures))


def _train_a_part() -> None:
    """Also train the query, key and value projections and the norms before them."""
    freeze = model_build._freeze

    def freeze_most(section: ModelConfig, model: Any) -> None:
        freeze(section, model)
        for name, parameter in model.language_model.named_parameters():
            if "linear_qkv" in name or "input_layernorm" in name:
                parameter.requires_grad_(True)

    model_build._freeze = freeze_most


def _all_of(names: set[str]) -> set[str]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, names)
    return set().union(*parts)


def whole_gradients(state: TrainState) -> dict[str, np.ndarray] | None:
    """Return the reduced gradient of every unsharded trainable weight on rank 0, None on other ranks. Collective."""
    for wrapped in state.wrapped:
        for group in wrapped.bucket_groups if state.config.model.ddp.use_distributed_optimizer else ():
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                # After the reduction, a rank has only the sums of its own shard of the bucket.
                shards = list(bucket.grad_data.chunk(ranks.size()))
                gathered_shards = [torch.empty_like(shard) for shard in shards]
                dist.all_gather(gathered_shards, shards[ranks.rank()].clone(), group=ranks)
                bucket.grad_data.copy_(torch.cat(gathered_shards))
    mine = {}
    for model in state.models:
        for weight in list_weights(model):
            if weight.parameter.requires_grad:
                whole = weight.gather(weight.parameter.main_grad)
                mine[weight.name] = whole.cpu().numpy().copy()
    contributes = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine if contributes else {}, gathered, dst=0)
    return None if gathered is None else {name: value for part in gathered for name, value in part.items()}


def compare(run: EngineRun, reference: Trace) -> Difference:
    """Compare a run with its reference; see Difference.

    Raises:
        AssertionError: the trained weights or the number of steps differ.
    """
    trace = run.trace
    assert len(trace.losses) == len(reference.losses)
    assert trace.weights.keys() == reference.weights.keys()
    loss = 0.0
    for own, wanted in zip(trace.losses, reference.losses):
        loss = _worse(loss, _ratio(abs(own - wanted), abs(wanted)))
    peaks = {name: max(_norm([g[name]]) for g in reference.gradients) for name in reference.weights}
    gradient, parameter, where = 0.0, 0.0, ""
    for step, (mine, theirs) in enumerate(zip(trace.gradients, reference.gradients), start=1):
        assert mine.keys() == theirs.keys()
        differences = {name: mine[name] - value for name, value in theirs.items()}
        gradient = _worse(gradient, _ratio(_norm(differences.values()), _norm(theirs.values())))
        for name, difference in differences.items():
            share = _ratio(_norm([difference]), peaks[name])
            if _worse(parameter, share) != parameter:
                parameter, where = share, f"{name}, step {step}"
    weight = 0.0
    for name, value in reference.weights.items():
        weight = _worse(weight, _ratio(_norm([trace.weights[name] - value]), _norm([value])))
    return Difference(loss, gradient, parameter, weight, where)


def _norm(arrays: Iterable[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(array.astype(np.float64)).sum()) for array in arrays))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0.0 else math.inf)


def _worse(a: float, b: float) -> float:
    """Return the larger value. NaN counts as larger than any number."""
    return b if not b <= a else a


def fingerprint(weights: dict[str, np.ndarray]) -> str:
    """Hash of unsharded weights, to check that two runs start from the same ones."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].tobytes())
    return digest.hexdigest()
