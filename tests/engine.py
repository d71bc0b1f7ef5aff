"""Training runs of the engine inside a forked rank, for tests to compare."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_anymal.config import RunConfig
from megatron_anymal.config.compose import compose, default_config_dir
from megatron_anymal.config.validation import check
from megatron_anymal.model.unsharded_weights import gather_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.loop import fit


def train(config: RunConfig, look: Callable[[TrainState], Any] | None = None) -> dict[str, Any]:
    """Train in this rank; return the step losses, the final weights (rank 0) and the result of `look` at the end."""
    state = build(config, initialize(config))
    run_dir = Path(config.exp_manager.explicit_log_dir)
    fit(state, run_dir)
    weights = gather_weights(state.models)
    return {
        "losses": losses(run_dir),
        "weights": {name: w.float().numpy() for name, w in weights.items()} if weights else None,
        "seen": look(state) if look else None,
    }


def attempt(config: RunConfig, variables: dict[str, str]) -> Any:
    """In a rank: train with memory for copies; return the error of a run that fails."""
    os.environ.update(variables)
    try:
        return train(config)
    except RuntimeError as error:
        return f"failed: {error}"


def train_as_configured(folder: Path, name: str, *overrides: str) -> None:
    """In a rank: train a shipped configuration in a folder, as `anymal` does, but without importing NeMo, which takes
    seconds."""
    os.chdir(folder)
    config = compose(name, default_config_dir(), overrides).config
    check(config)
    fit(build(config, initialize(config)), config.run_dir)


def losses(run_dir: Path) -> list[float]:
    """Training losses that a run logged, in step order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
