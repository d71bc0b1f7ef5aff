"""A run of this trainer with weights initialized on its device, and its competitors built from the same weights."""

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

# Timed sides: this trainer; megatron-core's GPTModel alone; the encoder and projector alone; transformers.
SIDES = ("ours", "bare", "media", "huggingface")
# Activation recomputation modes, the fastest first, and megatron-core's names for them.
RECOMPUTE = {"none": "", "mlp": "selective", "full": "full"}


@dataclass
class Run:
    """A run before its first step."""

    state: TrainState
    batches: Batches
    # Values of its projectors and adapters, by full name, and of the DPO reference's adapters.
    weights: dict[str, Tensor]
    reference: dict[str, Tensor]
    # Recomputation mode.
    recompute: str
    # Peak bytes while it was built.
    build_peak: int


def build_run(config: RunConfig, layout: ParallelLayout, batches: int) -> Run:
    """Build a run; weights and batches are the same each time."""
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
            # Change the policy: if it equaled the reference, the loss would not depend on the weights.
            _draw_adapters(state, 2)
        state.optimizer.reload_model_params()
    data = state.train_data
    read = steps(data.planner, data.reader, replica=0, start=0, stop=batches, num_workers=0, prefetch_steps=1)
    [recompute] = [name for name, key in RECOMPUTE.items() if key == config.model.recompute_granularity]
    return Run(state, list(read), _values(state), reference, recompute, build_peak)


@torch.no_grad()
def _draw_adapters(state: TrainState, seed: int) -> None:
    """Initialize adapters randomly, since a new adapter has B = 0 and no effect."""
    generator = torch.Generator(state.layout.device).manual_seed(seed)
    for weight in list_weights(state.models[0]):
        if ".lora." in weight.name and weight.name.endswith(".B"):
            weight.parameter.normal_(0.0, 0.01, generator=generator)


def _values(state: TrainState) -> dict[str, Tensor]:
    """Copies in host memory, so that they do not count towards any side's memory."""
    return {
        weight.name: weight.parameter.detach().to("cpu", copy=True)
        for weight in list_weights(state.models[0])
        if weight.name.startswith("projectors.") or ".lora." in weight.name
    }


@dataclass
class Side:
    """A side that is timed."""

    step: Callable[[int], Any]
    # Loss and gradient norm before clipping for the first batch with the initial weights.
    first: Optional[tuple[float, float]]
    # Recomputation mode.
    recompute: str
    # Peak bytes of a step as if the side were alone, including shared weights; None on CPUs and if not measured.
    peak: Optional[int]


def start(name: str, run: Run, recompute: str) -> Side:
    """Build a side and run every batch once.

    Args:
        name: one of SIDES; "ours" is the first on its GPU.
        recompute: one of RECOMPUTE; this trainer and the floor use the run's mode, transformers supports none and full.

    Raises:
        torch.OutOfMemoryError: it does not fit.
        ModuleNotFoundError: it needs a package that is not installed.
    """
    built = _MAKERS[name](run, recompute)
    step: Callable[[int], Any] = built.step
    if name == "bare" and run.state.config.job == "dpo":
        step = _with_reference(built)
    forget_peak()
    first = step(0)
    for number in range(1, len(run.batches)):
        step(number)
    peak = None
    if torch.cuda.is_available() and name in ("ours", "huggingface"):
        others = torch.cuda.memory_allocated() - built.stored() if name == "huggingface" else 0
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
    """Set a run's recomputation mode to one of RECOMPUTE."""
    config.model.recompute_granularity = RECOMPUTE[recompute]
    config.model.recompute_modules = ["mlp"]


def release() -> None:
    """Release the memory of unreferenced objects."""
    gc.collect()
    torch.cuda.empty_cache()


def peak_bytes() -> int:
    """Peak bytes of tensors on the GPU since `forget_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def forget_peak() -> None:
    """Reset the peak memory statistics."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
