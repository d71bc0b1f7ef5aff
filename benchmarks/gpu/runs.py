"""A run of this trainer with weights made on its device, and what it is timed against, from the same weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from anymal_side import Ours
from bare_megatron import Bare
from huggingface import Batches, HuggingFace, PlainMedia
from torch import Tensor

from megatron_anymal.config import RunConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.model.lora import keep_reference
from megatron_anymal.model.unsharded_weights import list_weights
from megatron_anymal.parallel import ParallelLayout
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.reference_logprobs import ReferenceAnswers

# What is timed: this trainer; megatron-core's GPTModel alone; the encoder and projector alone; transformers.
SIDES = ("ours", "bare", "media", "huggingface")
# What of a layer is computed twice to save memory, the fastest first, and megatron-core's name for it.
RECOMPUTE = {"none": "", "mlp": "selective", "full": "full"}


@dataclass
class Run:
    """A run before its first step."""

    state: TrainState
    batches: Batches
    # Values of its projectors and adapters, by their whole names, and of DPO's reference adapters.
    weights: dict[str, Tensor]
    reference: dict[str, Tensor]
    # What it computes twice.
    recompute: str
    # The most bytes there were while it was built.
    build_peak: int


def build_run(config: RunConfig, layout: ParallelLayout, batches: int) -> Run:
    """The same weights and batches each time."""
    forget_peak()
    state = build(config, layout)
    build_peak = peak_bytes()
    reference: dict[str, Tensor] = {}
    if config.model.lora.r:
        _draw_adapters(state, 1)
        if config.job == "dpo":
            keep_reference(state.models)
            reference = _values(state)
            state.reference = ReferenceAnswers(None, [], layout.device)
            # A policy that has moved: as the reference itself it would have the same loss whatever the weights.
            _draw_adapters(state, 2)
        state.optimizer.reload_model_params()
    data = state.train_data
    read = steps(data.planner, data.reader, replica=0, start=0, stop=batches, num_workers=0, prefetch_steps=1)
    [recompute] = [name for name, key in RECOMPUTE.items() if key == config.model.recompute_granularity]
    return Run(state, list(read), _values(state), reference, recompute, build_peak)


@torch.no_grad()
def _draw_adapters(state: TrainState, seed: int) -> None:
    """Adapters that change something: a new one's B is zero."""
    generator = torch.Generator(state.layout.device).manual_seed(seed)
    for weight in list_weights(state.models[0]):
        if ".lora." in weight.name and weight.name.endswith(".B"):
            weight.parameter.normal_(0.0, 0.01, generator=generator)


def _values(state: TrainState) -> dict[str, Tensor]:
    """Copies in host memory, so that no side's memory holds them."""
    return {
        weight.name: weight.parameter.detach().to("cpu", copy=True)
        for weight in list_weights(state.models[0])
        if weight.name.startswith("projectors.") or ".lora." in weight.name
    }


@dataclass
class Side:
    """Something that is timed."""

    step: Callable[[int], Any]
    # Loss, and norm of the gradient before clipping, of the first batch with the weights as they began.
    first: Optional[tuple[float, float]]
    # What is computed twice.
    recompute: str
    # Bytes at a step's peak as if it were alone, shared weights included; None on CPUs, and where it was not measured.
    peak: Optional[int]


def start(name: str, run: Run, recompute: str) -> Side:
    """Build a side and run every batch once.

    Args:
        name: of SIDES; "ours" is the first on its card.
        recompute: of RECOMPUTE; this trainer's and the floor's is the run's, transformers knows none and full.

    Raises:
        torch.OutOfMemoryError: it does not fit.
        ModuleNotFoundError: it needs a package that is not here.
    """
    made = _MAKERS[name](run, recompute)
    step: Callable[[int], Any] = made.step
    if name == "bare" and run.state.config.job == "dpo":
        step = _with_reference(made)
    forget_peak()
    first = step(0)
    for number in range(1, len(run.batches)):
        step(number)
    peak = None
    if torch.cuda.is_available() and name in ("ours", "huggingface"):
        others = torch.cuda.memory_allocated() - made.stored() if name == "huggingface" else 0
        peak = peak_bytes() - others
    return Side(step, _loss_and_norm(first), recompute, peak)


def _with_reference(bare: Bare) -> Callable[[int], None]:
    def step(number: int) -> None:
        bare.forward(number)
        bare.step(number)

    return step


def _loss_and_norm(result: Any) -> Optional[tuple[float, float]]:
    if result is None:
        return None
    if isinstance(result, tuple):
        return float(result[0]), float(result[1])
    return result.loss, result.grad_norm


_MAKERS: dict[str, Callable[[Run, str], Any]] = {
    "ours": lambda run, recompute: Ours(run.state, run.batches),
    "bare": lambda run, recompute: Bare(run.state, run.batches),
    "media": lambda run, recompute: PlainMedia(run.state, run.weights, run.batches),
    "huggingface": lambda run, recompute: HuggingFace(
        run.state, run.weights, run.reference, run.batches, checkpointing=recompute == "full"
    ),
}


def set_recompute(config: RunConfig, recompute: str) -> None:
    """Have a run compute one of RECOMPUTE twice."""
    config.model.recompute_granularity = RECOMPUTE[recompute]
    config.model.recompute_modules = ["mlp"]


def release() -> None:
    """Give back the memory of what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def peak_bytes() -> int:
    """The most bytes of tensors there were on the card since `forget_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def forget_peak() -> None:
    """Begin to look for a peak anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
