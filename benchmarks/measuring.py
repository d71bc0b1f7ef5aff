"""Tools of the benchmarks: arguments for sizes, alternating timings, memory usage, a description of the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_anymal.config.field_docs import field_docs
from megatron_anymal.model.quantized_weights import stored_tensors


def add_arguments(parser: argparse.ArgumentParser, *settings: type) -> None:
    """Add an argument for every field of dataclasses of sizes or repetitions; its help text is the documentation below
    the field."""
    for one in settings:
        bases = filter(is_dataclass, reversed(one.__mro__))
        docs = {name: text for base in bases for name, text in field_docs(base).items()}
        for field in fields(one):
            option, text = f"--{field.name.replace('_', '-')}", f"{docs[field.name]} Default: {field.default}."
            parser.add_argument(option, type=int, default=field.default, help=text)


@dataclass(frozen=True)
class Turns:
    """Seconds of one side, one entry per round."""

    wall: list[float]
    # CPU time of this process on all cores, which other processes disturb less than the wall clock.
    cpu: list[float]


@dataclass(frozen=True)
class Ratio:
    """Ratio of one side's seconds to another's."""

    # Median and quartiles over the rounds.
    median: float
    lower: float
    upper: float
    # Ratio of the fastest rounds, since other load on the machine only adds time.
    fastest: float


def take_turns(sides: Mapping[str, Callable[[int], None]], rounds: int, warm_up: int) -> dict[str, Turns]:
    """Time all sides in every round, in order in even rounds and in reverse order in odd ones.

    Args:
        sides: functions to time; called with the round's number.
        warm_up: preceding rounds that are not counted.
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
    """Compare the rounds of one side with those of another (two rounds or more)."""
    lower, median, upper = statistics.quantiles((a / b for a, b in zip(over, under, strict=True)), n=4)
    return Ratio(median, lower, upper, min(over) / min(under))


def timed(owner: Any, method: str) -> list[float]:
    """Wrap an object's method to append the seconds of each call to the returned list."""
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
    """Address -> size in bytes of the tensors' storages; for a quantized tensor those of what it consists of."""
    untyped = (part.untyped_storage() for tensor in tensors for part in stored_tensors(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in untyped if storage.nbytes()}


def stored_bytes(model: nn.Module, wrapped: Any, optimizer: Any) -> dict[str, int]:
    """Memory of a model in training between two steps, in bytes by kind.

    Args:
        wrapped: megatron-core's data-parallel wrapper around the model.
        optimizer: megatron-core's optimizer.

    Returns:
        "weights", "gradients", "moments", and "others": further tensors attached to parameters (fp32 values, gradients
        outside the buffers).
    """
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [o.optimizer for o in optimizers if o.optimizer is not None]
    main = [p for o in inner for group in o.param_groups for p in group["params"]]
    moments = [value for o in inner for state in o.state.values() for value in state.values()]
    weights = storages(model.parameters())
    gradients = storages(b.grad_data for b in [*wrapped.buffers, *wrapped.expert_parallel_buffers])
    attached = storages([*main, *(copy for p in [*main, *model.parameters()] for copy in copies(p))])
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "moments": sum(storages(value for value in moments if isinstance(value, Tensor)).values()),
        "others": sum(size for address, size in attached.items() if address not in {**weights, **gradients}),
    }


def copies(parameter: Any) -> list[Tensor]:
    """Gradients and fp32 value that megatron-core attaches to a parameter."""
    attached = (getattr(parameter, name, None) for name in ("grad", "main_grad", "main_param"))
    return [tensor for tensor in attached if tensor is not None]


def saved_for_backward(forward: Callable[[], Any], left_out: Iterable[Tensor]) -> tuple[dict[int, int], Any]:
    """Storages (address -> bytes) that autograd saves in a forward pass, except those of `left_out`; and the pass's
    return value."""
    known, kept = storages(left_out), []

    def keep(tensor: Tensor) -> Tensor:
        # Keep a reference until the end, so that no address is reused.
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        returned = forward()
    return {address: size for address, size in storages(kept).items() if address not in known}, returned


class PeakMemory(TorchDispatchMode):
    """Context that records in `peak` the maximum total bytes of live tensors created by torch operations in it.

    Tensors that existed before and temporary memory inside operations do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = storages(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor))
        out = func(*args, **(kwargs or {}))
        for tensor in (part for x in tree_flatten(out)[0] if isinstance(x, Tensor) for part in stored_tensors(x)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in before:
                self._held[StorageWeakRef(storage)] = storage.nbytes()
        self._held = {reference: size for reference, size in self._held.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self._held.values()))
        return out


class Dispatched(TorchDispatchMode):
    """Context that counts the torch operations called in it, including those of backward passes.

    Measured on a CPU, the counts predict a GPU's kernel launches and synchronizations. Kernels that exist only on one
    of them (attention, fused optimizers, collectives) differ, and tensors that a GPU's host keeps for itself count too.

    Attributes:
        operations: those that compute: no views and no allocations.
        collectives: collectives and messages between ranks, by torch's name (allreduce, send, ...).
        waits: how often the host waits for a device to read a value, by the line that called the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.collectives: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._functions = _ReadsOfTensors(self.waits)

    def __enter__(self) -> Dispatched:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.collectives[name.strip("_")] += 1
        if not (func.is_view or name.startswith(("empty", "new_empty", "detach"))):
            self.operations += 1
        if name in _WAITING or (name in _INDEXING and _looks_up_mask(name, args)):
            self.waits[_calling_line()] += 1
        return func(*args, **(kwargs or {}))


# Operations that return a value, or a shape that depends on values, to the host.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_READS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)


class _ReadsOfTensors(TorchFunctionMode):
    """Counts the methods that copy a tensor to the host, which do nothing on a CPU and are thus not dispatched."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits
        self._last: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and args[0] is not self._last:
            self._waits[_calling_line()] += 1
            # `x.cpu().tolist()` waits once; on a CPU both read the same tensor.
            self._last = args[0]
        return func(*args, **(kwargs or {}))


def _looks_up_mask(name: str, args: Any) -> bool:
    """Whether an indexing operation needs the positions where a mask is true; filling them with one value does not."""
    masks = [index for index in args[1] if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)]
    fills = name != "index" and args[2].numel() == 1 and not any(args[3:4])
    return bool(masks) and not fills


def _calling_line() -> str:
    frames = traceback.extract_stack()[:-2]
    # The lean imports wrap functions of torch, and some wrappers are made by `exec`.
    inside = ("/torch/", "/lean_imports/", "<", __file__)
    outside = [f for f in frames if not any(part in f.filename for part in inside)]
    return f"{outside[-1].filename}:{outside[-1].lineno}" if outside else ""


def surroundings() -> dict[str, Any]:
    """Date, machine, and relevant package versions."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = round(psutil.virtual_memory().total / 2**30)
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores ({cpu[0] if cpu else platform.machine()}), {memory} GiB, {gpu}",
        "threads": torch.get_num_threads(),
        # Load average over the minute before the benchmark: above 0 if other work ran.
        "load": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")},
        },
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
