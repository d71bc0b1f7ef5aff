"""What benchmarks measure with: time taken in turns, bytes stored and kept, and the machine they ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Turns:
    """One side's seconds, one of each round."""

    wall: list[float]
    # Of this process on all its cores: other processes add less to it than to the wall clock.
    cpu: list[float]


@dataclass(frozen=True)
class Ratio:
    """One side's seconds over another's."""

    # Median and quartiles over the rounds.
    median: float
    lower: float
    upper: float
    # Of the fastest round of each: other work on the machine only ever adds.
    fastest: float


def take_turns(sides: Mapping[str, Callable[[int], None]], rounds: int, warm_up: int) -> dict[str, Turns]:
    """Time all sides in every round, in their order and in the next round backwards.

    Args:
        sides: called with the round's number.
        warm_up: rounds before, that do not count.
    """
    turns = {name: Turns([], []) for name in sides}
    for number in range(warm_up + rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            torch.cuda.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name](number)
            torch.cuda.synchronize()
            if number >= warm_up:
                turns[name].wall.append(time.perf_counter() - wall)
                turns[name].cpu.append(time.process_time() - cpu)
    return turns


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """How the rounds of one side compare with those of another (two or more)."""
    lower, median, upper = statistics.quantiles((a / b for a, b in zip(over, under, strict=True)), n=4)
    return Ratio(median, lower, upper, min(over) / min(under))


def timed(owner: Any, method: str) -> list[float]:
    """Have an object's method note the seconds of each call in the list that is returned."""
    seconds: list[float] = []
    call = getattr(owner, method)

    def noting(*arguments: Any, **settings: Any) -> Any:
        begun = time.perf_counter()
        result = call(*arguments, **settings)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        return result

    setattr(owner, method, noting)
    return seconds


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of what the tensors lie in."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def stored_bytes(model: nn.Module, wrapped: Any, optimizer: Any) -> dict[str, int]:
    """The bytes that a model in training holds between two steps, by kind.

    Args:
        wrapped: megatron-core's data-parallel wrapper around the model.
        optimizer: megatron-core's.

    Returns:
        weights, gradients, moments, and what else hangs on parameters (fp32 values, gradients outside the buffers).
    """
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [o.optimizer for o in optimizers if o.optimizer is not None]
    main = [p for o in inner for group in o.param_groups for p in group["params"]]
    moments = [value for o in inner for state in o.state.values() for value in state.values()]
    weights = storages(model.parameters())
    gradients = storages(b.grad_data for b in [*wrapped.buffers, *wrapped.expert_parallel_buffers])
    hung = storages([*main, *(copy for p in [*main, *model.parameters()] for copy in copies(p))])
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "moments": sum(storages(value for value in moments if isinstance(value, Tensor)).values()),
        "others": sum(size for place, size in hung.items() if place not in {**weights, **gradients}),
    }


def copies(parameter: Any) -> list[Tensor]:
    """The gradients and the fp32 value that megatron-core hangs on a parameter."""
    found = (getattr(parameter, name, None) for name in ("grad", "main_grad", "main_param"))
    return [tensor for tensor in found if tensor is not None]


def saved_for_backward(forward: Callable[[], Any], left_out: Iterable[Tensor]) -> tuple[dict[int, int], Any]:
    """Address -> bytes of what autograd keeps of a forward pass, apart from tensors that are there anyway; and what the
    pass returns."""
    known, kept = storages(left_out), []

    def keep(tensor: Tensor) -> Tensor:
        # Held until the end, so that no address comes twice.
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        returned = forward()
    return {place: size for place, size in storages(kept).items() if place not in known}, returned


class PeakMemory(TorchDispatchMode):
    """Within it: the most bytes that tensors made by torch's operations held at once, in `peak`.

    What was there before does not count, and neither does what an operation needs inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = storages(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor))
        out = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_flatten(out)[0] if isinstance(x, Tensor)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in before:
                self._held[StorageWeakRef(storage)] = storage.nbytes()
        self._held = {reference: size for reference, size in self._held.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self._held.values()))
        return out


def surroundings() -> dict[str, Any]:
    """The date, the machine, and the versions that matter."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = round(psutil.virtual_memory().total / 2**30)
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores ({cpu[0] if cpu else platform.machine()}), {memory} GiB, {gpu}",
        "threads": torch.get_num_threads(),
        # Processes that wanted a core in the last minute, before this one began: above 0 other work ran.
        "load": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")},
        },
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
