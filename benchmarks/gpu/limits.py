"""Practical limits of a GPU: rates of a large matrix product in bf16 and FP8, and of a memory copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_anymal import backend

# Rows, columns and inner dimension of the product; bytes of the copy.
PRODUCT, DRY_PRODUCT = 8192, 256
COPY, DRY_COPY = 2 << 30, 1 << 20
# Minimum seconds per round of a timing, and number of rounds.
ROUND_SECONDS, ROUNDS = 0.1, 7


def seconds_of(call: Callable[[], Any], device: torch.device, *, dry_run: bool) -> float:
    """Median seconds of a call, over rounds of many calls: by CUDA events on a GPU, by the clock on a CPU."""
    call()
    rounds, once = (3, 0.0) if dry_run else (ROUNDS, _round(call, 3, device))
    calls = 1 if dry_run else max(1, int(ROUND_SECONDS / once))
    return statistics.median(_round(call, calls, device) for _ in range(rounds))


def _round(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begun) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def measure_limits(device: torch.device, *, dry_run: bool) -> dict[str, Any]:
    """Rates in operations and bytes per second; for FP8, the reason if it cannot be measured."""
    size, copied = (DRY_PRODUCT, DRY_COPY) if dry_run else (PRODUCT, COPY)
    generator = torch.Generator(device).manual_seed(0)
    # Random numbers: products of zeros draw less power, so that a GPU clocks higher than in training.
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
    limits: dict[str, Any] = {"product_size": size, "copy_bytes": copied}
    limits["bf16"] = 2 * size**3 / seconds_of(lambda: a @ b, device, dry_run=dry_run)
    limits["fp8"], limits["fp8_left_out"] = None, ""
    if not backend.capabilities().fp8:
        limits["fp8_left_out"] = "it needs a GPU of compute capability 8.9 or later"
    else:
        limits["fp8"] = 2 * size**3 / seconds_of(_product_in_fp8(a, b), device, dry_run=dry_run)
    source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    # Every byte is read and written.
    limits["copy"] = 2 * copied / seconds_of(lambda: target.copy_(source), device, dry_run=dry_run)
    return limits


def _product_in_fp8(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """FP8 product with one scale per operand, as in delayed and current scaling."""
    one = torch.ones((), device=a.device)
    # The right operand is column-major, as the hardware requires.
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    return lambda: torch._scaled_mm(
        left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
