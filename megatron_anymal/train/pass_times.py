"""Where the time of a step goes: passes, gradients, optimizer, and the rest, in which a pipeline waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch

from megatron_anymal.model.frozen_features import ENCODING
from megatron_anymal.parallel import ParallelLayout, sum_over_ranks
from megatron_anymal.resilience.stragglers import OwnTime

# Name of a timer, most of them of megatron-core (schedules.py, finalize_model_grads.py) -> name of its metric.
_TIMERS = {
    "forward-compute": "forward_seconds",
    "backward-compute": "backward_seconds",
    "all-grads-sync": "gradient_seconds",
    "update": "update_seconds",
}
# Name of the timer of encoders' forward passes between those of the model (StageEncoding).
AHEAD = "media-encoding-ahead"
# Names of these metrics: seconds per step as means over the ranks.
PASS_METRICS = (*_TIMERS.values(), "idle_seconds")


class _Timer:
    """One timer in the form that megatron-core expects. Barriers that it asks for are left out: they cost time."""

    def __init__(self, time: Optional[OwnTime]) -> None:
        self._time = time

    def start(self, barrier: bool = False) -> None:
        """Begin a section."""
        if self._time is not None:
            self._time.start()

    def stop(self, barrier: bool = False) -> None:
        """End the section."""
        if self._time is not None:
            self._time.stop()


class PassTimes:
    """Timers for the `timers` of a megatron-core configuration; those that no metric needs do nothing."""

    def __init__(self, device: torch.device) -> None:
        self._times = {name: OwnTime(device) for name in _TIMERS}
        self._encoding = {ENCODING: OwnTime(device), AHEAD: OwnTime(device)}
        self._timers = {name: _Timer(time) for name, time in (*self._times.items(), *self._encoding.items())}
        self._none = _Timer(None)

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        """Return the timer of a name."""
        return self._timers.get(name, self._none)

    def take(self) -> dict[str, float]:
        """Return the seconds of each metric since the last call, without `idle_seconds`."""
        return {_TIMERS[name]: time.take() for name, time in self._times.items()}

    def take_encoding(self) -> list[float]:
        """Return the seconds of the encoders' forward passes since the last call: within those of the model, which
        `forward_seconds` holds, and between them."""
        return [time.take() for time in self._encoding.values()]


def pass_metrics(
    times: PassTimes, steps: int, metrics: Mapping[str, Any], layout: ParallelLayout, further: Sequence[float]
) -> tuple[dict[str, float], list[float]]:
    """Return PASS_METRICS of the last steps, and the sums over the ranks of further numbers. Collective.

    `idle_seconds` is what a step takes beyond its measured sections and the wait for data: pipeline stages wait for
    each other and for messages, and the host prepares.

    Args:
        steps: their number.
        metrics: this rank's `step_seconds` and `data_wait_share`.
        further: this rank's numbers to sum in the same reduction.
    """
    own = [seconds / steps for seconds in times.take().values()]
    idle = metrics["step_seconds"] * (1 - metrics["data_wait_share"]) - sum(own)
    sums = torch.tensor([*own, idle, *further], dtype=torch.float64, device=layout.device)
    sum_over_ranks(sums)
    totals = sums.tolist()
    return {name: total / layout.world_size for name, total in zip(PASS_METRICS, totals)}, totals[len(PASS_METRICS) :]
