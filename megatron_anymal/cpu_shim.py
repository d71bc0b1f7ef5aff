"""CPU shim: runs megatron-core on CPUs over gloo.

This is the only module that pretends that CUDA is present. It is imported only if there is no CUDA device; the code
above it is the same in both cases. It changes four things:

1. calls into `torch.cuda` that are meaningless on CPUs (streams, events, synchronisation, device numbers) do nothing,
   and its random generator is the CPU's;
2. tensors requested on "cuda" are created on the CPU. Only the functions that take a device are replaced: a
   TorchFunctionMode would see every call of every torch function, 10 % of a small model's step;
3. fused functions that would start a compiler at their first call run eagerly; the largest, the backward pass of
   SwiGLU, is written for that;
4. all-gathers that megatron-core coalesces are sent one by one: gloo's coalesced ones can corrupt the memory of the
   process (torch 2.13.0; pytorch/pytorch issue 65231).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _CoalescingManager
from torch.utils._device import _device_constructors

from megatron_anymal import lean_imports

_CPU = torch.device("cpu")
# Functions that take a device but are not in torch's own list of factories.
_LIKE = ("empty_like", "full_like", "normal", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_installed = False


def install() -> None:
    """Enable this process to run megatron-core without CUDA. Idempotent.

    From then on torch.jit.script cannot compile functions that create tensors, whose factories are replaced.

    Raises:
        RuntimeError: a CUDA device is present.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("The CPU shim was requested on a machine with CUDA.")
    _replace_cuda_calls()
    _replace_generator()
    _replace_factories()
    _replace_moves()
    _run_eagerly()
    _gather_one_by_one()
    _installed = True


def _replace_factories() -> None:
    # The list must exist before: `with torch.device(...)` recognizes factories by identity, in this cached list.
    names = [function.__name__ for function in _device_constructors()]
    for owner, functions in ((torch, [*names, *_LIKE]), (torch.Tensor, _NEW)):
        for name in functions:
            # A few of the list are elsewhere, such as torch.fft.fftfreq.
            if hasattr(owner, name):
                setattr(owner, name, _on_cpu(getattr(owner, name), name))


def _on_cpu(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Redirect the keyword `device` of a function that creates a tensor."""

    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    # Functions are pickled by their names.
    create.__module__, create.__qualname__ = "torch", name
    return create


def _replace_moves() -> None:
    """Redirect the methods that move a tensor to another device, or name the device that it is on."""
    tensor: Any = torch.Tensor
    to, type_of = tensor.to, tensor.type

    @functools.wraps(to)
    def to_device(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        return to(self, *args, **kwargs)

    @functools.wraps(type_of)
    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        type_name = type_of(self, *args, **kwargs)
        if not isinstance(type_name, str) or type_name.startswith("torch.cuda."):
            # Under a TorchFunctionMode, torch calls this function a second time.
            return type_name
        # megatron-core sorts parameters by the name of their CUDA type.
        return type_name.replace("torch.", "torch.cuda.", 1)

    tensor.to, tensor.type = to_device, cuda_type
    tensor.cuda = tensor.pin_memory = lambda self, *args, **kwargs: self


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Stream:
    """A stream on which all work is already complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()


class _Event:
    """An event that is already complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _replace_cuda_calls() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in ("synchronize", "empty_cache", "set_device"):
        # One function object per name: torch's compiler keeps a table of these functions by identity.
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda *a, **k: _Stream()
    cuda.default_stream = lambda *a, **k: _Stream()
    cuda.stream = lambda *a, **k: contextlib.nullcontext()


def _replace_generator() -> None:
    import megatron.core.tensor_parallel.random as mcore_random

    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    module: Any = mcore_random
    module._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    # The CPU generator doubles as the device's here, so the warning that it changed is spurious.
    logging.getLogger(mcore_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def _run_eagerly() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    # Most runs never import the compiler.
    lean_imports.when_run("torch._dynamo", lambda: torch.compiler.set_stance("force_eager"))
    swiglu: Any = fused_bias_swiglu
    swiglu.swiglu_back = _swiglu_back


def _swiglu_back(gradient: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gradient of SwiGLU's input y [..., 2 n] from that of its output [..., n], with few temporaries."""
    gate, up = y.chunk(2, dim=-1)
    result = torch.empty_like(y)
    of_gate, of_up = result.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = torch.mul(gate, sigmoid, out=of_up)
    # The derivative of SiLU: s + silu (1 - s).
    torch.addcmul(silu, silu, sigmoid, value=-1, out=of_gate)
    of_gate.add_(sigmoid).mul_(gradient).mul_(up)
    of_up.mul_(gradient)
    return result


def _gather_one_by_one() -> None:
    # The second name is that of torch 2.13 and later.
    for name in ("allgather_into_tensor_coalesced", "all_gather_single_coalesced"):
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, _all_gathers)


def _all_gathers(
    group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], options: Any
) -> _CoalescingManager:
    """Start an all-gather for each pair of an output [ranks x n] and an input [n]; return them as one to wait for."""
    works = _CoalescingManager()
    for output, given in zip(outputs, inputs):
        works.append(group._allgather_base(output, given, options))
    return works
