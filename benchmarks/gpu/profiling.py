"""Profile of a few steps: the most expensive kernels, and the share of time that the GPU is idle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Number of kernels listed.
TOP = 25


def profiled(step: Callable[[int], Any], steps: int) -> dict[str, Any]:
    """Profile some steps after one warm-up step. On CPUs, operators are listed instead of kernels."""
    on_card = torch.cuda.is_available()
    step(0)
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with profile(activities=activities) as profiler:
        for number in range(1, steps + 1):
            step(number)
        torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_card else DeviceType.CPU
    events: list[Any] = [event for event in profiler.events() or [] if event.device_type == wanted]
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        # For nested operators, count only their own time.
        seconds[event.name] += (event.time_range.elapsed_us() if on_card else event.self_cpu_time_total) / 1e6
        calls[event.name] += 1
    total = sum(seconds.values())
    ranked = sorted(seconds, key=lambda name: -seconds[name])[:TOP]
    return {
        "steps": steps,
        "kind": "kernels" if on_card else "operators of the CPU",
        "seconds": total,
        "idle_share": idle_share((e.time_range.start, e.time_range.end) for e in events) if on_card else None,
        "top": [
            {"name": name, "seconds": seconds[name], "share": seconds[name] / total, "calls": calls[name]}
            for name in ranked
        ],
    }


def idle_share(spans: Iterable[tuple[float, float]]) -> float:
    """Share of the time from the start of the first span to the end of the last that no span covers."""
    ordered = sorted(spans)
    if not ordered:
        return 1.0
    begin, covered, until = ordered[0][0], 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1.0 - covered / (until - begin) if until > begin else 0.0
