"""The CPU shim redirects what is requested on "cuda", and nothing else."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch.distributed import _coalescing_manager
from torch.utils._device import _device_constructors

from megatron_anymal import cpu_shim

# Arguments of factories that need any.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "empty_permuted": ((2,), (0,)),
    "empty_strided": ((2,), (1,)),
    "full": ((2,), 1.0),
    "linspace": (0, 1, 2),
    "logspace": (0, 1, 2),
    "randint": (3, (2,)),
    "range": (0, 2),
    "as_tensor": ([1.0],),
    "asarray": ([1.0],),
    "tensor": ([1.0],),
    "scalar_tensor": (1.0,),
    "tril_indices": (2, 2),
    "triu_indices": (2, 2),
}
# They need a layout or a quantizer, which megatron-core has no use for.
ELSEWHERE = ("sparse", "quantized", "nested", "fft")


def devices_of_factories() -> dict[str, set[str]]:
    """In a rank: the devices that tensors requested on "cuda" are on, by function."""
    names = [f.__name__ for f in _device_constructors() if not any(word in f.__name__ for word in ELSEWHERE)]
    cpu_shim.install()
    one = torch.ones(2)
    devices_by_name: dict[str, set[str]] = {}
    for device in ("cuda", "cuda:0", torch.device("cuda"), torch.cuda.current_device()):
        for name in names:
            made = getattr(torch, name)(*ARGUMENTS.get(name, (2,)), device=device)
            devices_by_name.setdefault(name, set()).add(str(made.device))
        for name in cpu_shim._LIKE:
            further = {"full_like": (1.0,), "randint_like": (3,)}.get(name, ())
            given = (0.0, 1.0, (2,)) if name == "normal" else (one, *further)
            devices_by_name.setdefault(name, set()).add(str(getattr(torch, name)(*given, device=device).device))
        for name in cpu_shim._NEW:
            given = {"new_full": ((2,), 1.0), "new_empty_strided": ((2,), (1,)), "new_tensor": ([1.0],)}.get(name, (2,))
            devices_by_name.setdefault(name, set()).add(str(getattr(one, name)(*given, device=device).device))
        devices_by_name.setdefault("to", set()).update(str(x.device) for x in (one.to(device), one.to(device=device)))
        devices_by_name.setdefault("cuda", set()).add(str(one.cuda().device))
    return devices_by_name


def test_tensors_requested_on_cuda_are_on_the_cpu() -> None:
    devices_by_name = run_ranks(1, devices_of_factories)[0]
    assert (
        len(devices_by_name) > 35
        and {"zeros", "tensor", "randperm", "empty_like", "new_zeros"} <= devices_by_name.keys()
    )
    assert {name: devices for name, devices in devices_by_name.items() if devices != {"cpu"}} == {}


def what_else_changes() -> dict[str, Any]:
    """In a rank: behaviour that the shim must not change, and that of other threads."""
    untouched = torch.add, torch.matmul, torch.Tensor.__getitem__, torch.nn.functional.linear
    cpu_shim.install()
    cpu_shim.install()
    behaviour: dict[str, Any] = {
        "modes": torch._C._len_torch_function_stack(),
        "untouched": untouched == (torch.add, torch.matmul, torch.Tensor.__getitem__, torch.nn.functional.linear),
        "pickled": pickle.loads(pickle.dumps(torch.zeros)) is torch.zeros,
        "types": [torch.ones(1, dtype=t).type() for t in (torch.float32, torch.bfloat16)],
        "type with argument": torch.ones(1).type(torch.int64).dtype,
        "pinned": torch.empty(2, pin_memory=True).is_pinned(),
    }
    with torch.device("meta"):
        behaviour["meta"] = [torch.zeros(2).device.type, torch.zeros(2, device="cpu").device.type]
        behaviour["meta, moved"] = torch.zeros(2).to("meta").device.type

    def elsewhere() -> None:
        behaviour["thread"] = torch.zeros(1, device="cuda").device.type

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    return behaviour


def test_nothing_else_changes() -> None:
    assert run_ranks(1, what_else_changes)[0] == {
        "modes": 0,
        "untouched": True,
        "pickled": True,
        "types": ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"],
        "type with argument": torch.int64,
        "pinned": False,
        "meta": ["meta", "cpu"],
        "meta, moved": "meta",
        "thread": "cpu",
    }


def coalesced_gathers(asynchronous: bool) -> tuple[int, list[list[float]]]:
    """In one of two ranks: the number of all-gathers that three coalesced ones become, and their results."""
    cpu_shim.install()
    dist.init_process_group("gloo")
    calls: list[Any] = []
    single: Any = dist.ProcessGroup._allgather_base
    dist.ProcessGroup._allgather_base = lambda *args: calls.append(args) or single(*args)
    outputs = [torch.zeros(2 * size) for size in (1, 2, 3)]
    # As megatron-core gathers updated parameters.
    with _coalescing_manager(async_ops=asynchronous) as works:
        for output in outputs:
            part = torch.full((len(output) // 2,), len(output) + dist.get_rank() / 2)
            dist.all_gather_into_tensor(output, part, async_op=asynchronous)
    if asynchronous:
        works.wait()
    return len(calls), [output.tolist() for output in outputs]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_coalesced_all_gathers_are_sent_one_by_one(asynchronous: bool) -> None:
    values = [[2.0, 2.5], [4.0, 4.0, 4.5, 4.5], [6.0, 6.0, 6.0, 6.5, 6.5, 6.5]]
    assert run_ranks(2, coalesced_gathers, asynchronous) == [(3, values)] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_of_swiglu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y = (4 * torch.randn(3, 2, 10, generator=generator)).to(dtype).requires_grad_()
    gradient = torch.randn(3, 2, 5, generator=generator).to(dtype)
    gate, up = y.chunk(2, dim=-1)
    (expected,) = torch.autograd.grad(F.silu(gate) * up, y, gradient)
    rtol = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(cpu_shim._swiglu_back(gradient, y.detach()), expected, rtol=rtol, atol=rtol)
