"""Where the time of a step goes: passes, gradients, optimizer, and the rest, in which a pipeline waits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_anymal.model.frozen_features import ENCODING
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


def own_passes(times: PassTimes, steps: int, metrics: Mapping[str, Any]) -> list[float]:
    """This rank's seconds per step, one number for each of PASS_METRICS, since the last call.

    `idle_seconds` is what a step takes beyond its measured sections and the wait for data: pipeline stages wait for
    each other and for messages, and the host prepares.

    Args:
        steps: steps since the last call.
        metrics: this rank's `step_seconds` and `data_wait_share`.
    """
    own = [seconds / steps for seconds in times.take().values()]
    return [*own, metrics["step_seconds"] * (1 - metrics["data_wait_share"]) - sum(own)]


def pass_metrics(every: Tensor) -> dict[str, float]:
    """Return PASS_METRICS.

    Args:
        every: `own_passes` of all ranks, [ranks, numbers].
    """
    return dict(zip(PASS_METRICS, every.mean(0).tolist()))
