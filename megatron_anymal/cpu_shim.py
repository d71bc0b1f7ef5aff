"""CPU shim: runs megatron-core 0.16 on CPUs over gloo.

This is the only module that pretends that CUDA is present. It is imported only if there is no CUDA device; the code
above it is the same in both cases. It changes three things:

1. calls into `torch.cuda` that are meaningless on CPUs (streams, events, synchronisation, device numbers) do nothing,
   and its random generator is the CPU's;
2. tensors requested on "cuda" are created on the CPU;
3. fused functions that would start a compiler at their first call run eagerly.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch.overrides import TorchFunctionMode

from megatron_anymal import lean_imports

_CPU = torch.device("cpu")
_active: Optional[_CudaMeansCpu] = None


def install() -> None:
    """Enable this process to run megatron-core without CUDA. Idempotent.

    The tensor mode applies to the calling thread only: code on other threads must not request "cuda".

    Raises:
        RuntimeError: a CUDA device is present.
    """
    global _active
    if _active is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("The CPU shim was requested on a machine with CUDA.")
    _replace_cuda_calls()
    _replace_generator()
    _run_eagerly()
    _active = _CudaMeansCpu()
    _active.__enter__()


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects every tensor meant for "cuda" to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and any(_is_cuda(a) for a in args[1:]):
            args = tuple(_CPU if _is_cuda(a) else a for a in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron-core sorts parameters by the name of their CUDA type.
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


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
    # Most runs never import the compiler.
    lean_imports.when_run("torch._dynamo", lambda: torch.compiler.set_stance("force_eager"))
