"""Measure the numbers of a `Hardware` on this machine: matrix products by shape, attention, memory, collectives."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

# Sizes of the products, each a power of two times the smallest: rows, columns and depth.
_SIZES = ((64, 256, 1024, 4096), (64, 256, 1024, 4096), (64, 256, 1024, 4096))
# Products with more multiply-adds are left out: (CPU, GPU).
_LARGEST = (2**28, 2**37)
# Seconds that one shape is repeated for, and bytes of the collectives.
_SECONDS, _MESSAGES = 0.05, (2**12, 2**16, 2**20, 2**24)
# Seconds between two collectives on a CPU: in training, computation lies between them, and processes that have waited
# take longer to start one than processes that do nothing else.
_PAUSE = 0.002


def measure_machine() -> dict[str, tuple[Any, str]]:
    """Measure this machine's first device and the collectives between its devices (on a CPU, gloo processes).

    Returns:
        Entries of a hardware file: value and source. A machine without several GPUs has no link between them: then the
        network's numbers are those of the node.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = f"measured on {date.today().isoformat()}"
    rates = matrix_rates(device)
    best = max(rate for *_, rate in rates)
    forward, backward = attention_rates(device)
    rate, latency = collective_rate(device)
    count = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    numbers: dict[str, Any] = {
        "name": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})",
        "memory_gb": _memory(device, count) / 1e9,
        "memory_gb_per_s": copy_rate(device) / 1e9,
        "bf16_tflops": best,
        "fp8_tflops": 0.0,
        "fp32_tflops": best,
        "bf16_matrix_share": 1.0,
        "fp8_matrix_share": 1.0,
        "attention_forward_share": forward / (1e12 * best),
        "attention_backward_share": backward / (1e12 * best),
        "multiprocessors": 1,
        "tile": [1, 1],
        "matrix_ramp": 0,
        "memory_share": 1.0,
        "kernel_us": 1e6 * _seconds(partial(torch.ones(16, device=device).add_, 1.0), device),
        "node_gpus": count,
        "node_gb_per_s": rate / 1e9,
        "network_gb_per_s": rate / 1e9,
        "link_share": 1.0,
        "node_latency_us": 1e6 * latency,
        "network_latency_us": 1e6 * latency,
        "matrix_rates": [list(row) for row in rates],
    }
    return {key: (_rounded(value), source) for key, value in numbers.items()}


def write_measurement(path: Path, entries: dict[str, tuple[Any, str]]) -> None:
    """Write a file that `load_hardware` reads."""
    body = {key: list(entry) for key, entry in entries.items()}
    header = "# Written by anymal plan --measure. Each entry is [value, source].\n"
    path.write_text(header + yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=120))


def matrix_rates(device: torch.device) -> list[tuple[int, int, int, float]]:
    """Measure matrix products [m, k] x [k, n] in bf16, on a CPU in fp32: (m, n, k, 1e12 operations per second)."""
    on_gpu = device.type == "cuda"
    dtype, largest = torch.bfloat16 if on_gpu else torch.float32, _LARGEST[on_gpu]
    rates = []
    for m, n, k in ((m, n, k) for m in _SIZES[0] for n in _SIZES[1] for k in _SIZES[2]):
        if m * n * k <= largest:
            rates.append((m, n, k, 1e-12 * product_rate(m, n, k, device, dtype)))
    return rates


def product_rate(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> float:
    """Measure a matrix product [m, k] x [k, n]: operations per second."""
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    return 2.0 * m * n * k / _seconds(partial(torch.matmul, a, b), device)


def attention_rates(device: torch.device) -> tuple[float, float]:
    """Measure causal attention of one document: operations per second of its forward and of its backward pass."""
    on_gpu = device.type == "cuda"
    heads, length, channels = (16, 4096, 128) if on_gpu else (4, 512, 64)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape = (1, heads, length, channels)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, is_causal=True)
    output = attend()
    backward = partial(torch.autograd.grad, output.sum(), (query, key, value), retain_graph=True)
    product = heads * length**2 * channels
    return 2 * product / _seconds(attend, device), 5 * product / _seconds(backward, device)


def copy_rate(device: torch.device) -> float:
    """Measure a copy that does not fit into caches: bytes read and written per second."""
    source = torch.ones(2**26 if device.type == "cuda" else 2**24, device=device)
    return 2 * source.nbytes / _seconds(partial(torch.empty_like(source).copy_, source), device)


def collective_rate(device: torch.device) -> tuple[float, float]:
    """Measure all-gathers between this machine's devices: bytes per second that a rank sends, and seconds of latency.

    A single GPU has nobody to send to: its own copy rate stands for a link then. On a CPU there are as many processes
    as cores, at least two, and each collective follows a pause.
    """
    on_gpu = device.type == "cuda"
    ranks = torch.cuda.device_count() if on_gpu else max(2, os.cpu_count() or 1)
    if ranks == 1:
        return copy_rate(device), 0.0
    # Held by this process, so that the port cannot be taken while the others start.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    times = mp.get_context("spawn").SimpleQueue()
    arguments = (ranks, store.port, "nccl" if on_gpu else "gloo", times)
    mp.start_processes(_gather_times, arguments, ranks, start_method="spawn")
    seconds = times.get()
    # The smallest message shows the latency, the largest the rate; an all-gather starts log2(ranks) messages.
    latency = seconds[0] / math.log2(ranks)
    sent = _MESSAGES[-1] * (ranks - 1) / ranks
    return sent / max(1e-9, seconds[-1] - seconds[0]), latency


def _gather_times(rank: int, ranks: int, port: int, backend: str, times: Any) -> None:
    """Put the median seconds of an all-gather of each size, as rank 0."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    seconds = []
    for size in _MESSAGES:
        own = torch.ones(size // 4 // ranks, device=device)
        parts = [torch.empty_like(own) for _ in range(ranks)]
        gather = partial(dist.all_gather, parts, own)
        seconds.append(_seconds(gather, device, repeats=20, pause=0.0 if device.type == "cuda" else _PAUSE))
    if rank == 0:
        times.put(seconds)
    dist.destroy_process_group()


def _seconds(action: Callable[[], object], device: torch.device, repeats: int = 0, pause: float = 0.0) -> float:
    """Median seconds of an action.

    Args:
        repeats: number of runs, the same on every rank; 0: as many as _SECONDS allow, at least 3.
        pause: seconds before each run.
    """
    for _ in range(2):
        action()
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < max(3, repeats) or (not repeats and time.perf_counter() - begun < _SECONDS):
        _wait(device)
        time.sleep(pause)
        start = time.perf_counter()
        action()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory(device: torch.device, count: int) -> int:
    """Bytes of a GPU, or of a CPU core's share of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // count


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_rounded(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
