"""Metrics of the steps since the last log line."""

from __future__ import annotations

from typing import Any

from megatron_anymal.train.step import StepResult


class MetricsWindow:
    """Collects the steps of a log interval."""

    def __init__(self) -> None:
        # Per step: its seconds, those spent waiting for data, and its result.
        self._steps: list[tuple[float, float, StepResult]] = []

    def add(self, seconds: float, waited: float, result: StepResult) -> None:
        """Add a step; `waited` of its seconds were spent waiting for data."""
        self._steps.append((seconds, waited, result))

    def take(self) -> tuple[int, dict[str, Any]]:
        """Return the number of steps (at least one) and their metrics, and start a new interval.

        Losses are those of the last step; times and rates are means.
        """
        steps, self._steps = self._steps, []
        seconds = sum(taken for taken, _, _ in steps)
        tokens = sum(result.tokens for _, _, result in steps)
        last = steps[-1][2]
        return len(steps), {
            "loss": last.loss,
            **{f"loss/{name}": value for name, value in last.loss_by_modality.items()},
            **{f"targets/{name}": float(count) for name, count in last.counts_by_modality.items()},
            **{f"target_loss/{kind}": value for kind, value in last.loss_by_kind.items()},
            **{f"target_tokens/{kind}": count for kind, count in last.targets_by_kind.items()},
            **last.measures,
            **_updates(last),
            "tokens_per_second": tokens / seconds,
            "real_token_share": tokens / sum(result.padded_tokens for _, _, result in steps),
            "step_seconds": seconds / len(steps),
            "data_wait_share": sum(waited for _, waited, _ in steps) / seconds,
        }


def _updates(step: StepResult) -> dict[str, float]:
    """Norm of the gradient and learning rate, of each alignment if there are several."""
    if not step.rates:
        return {"grad_norm": step.grad_norm, "lr": step.lr}
    norms = {f"grad_norm/{name}": norm for name, norm in step.grad_norms.items()}
    return norms | {f"lr/{name}": rate for name, rate in step.rates.items()}
