"""Costs of the encoders, by which packs are balanced: estimated from operations, measured, or configured.

All ranks plan with the numbers of rank 0. Measured ones are kept in the run folder, so that every later start of the
run, under any layout and on any machine, plans the same packs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_anymal.config import ConfigError
from megatron_anymal.model.encoders.base import Encoder
from megatron_anymal.train.build import TrainState, share_encoding

FILE = "encoder_costs.json"
# Pieces of a timed call, and how many calls are timed, after one that warms up.
_PIECES, _CALLS = 8, 5
# A backward pass takes twice the operations of a forward pass.
_TRAINED = 3


def agree_on_costs(state: TrainState, run_dir: Path, say: Callable[[str], None]) -> None:
    """Let the planners balance packs by the costs that `model.encoder_costs` names. Collective.

    Raises:
        ConfigError: on all ranks, if the costs of an earlier start cannot be read.
    """
    model = state.config.model
    if not model.modalities:
        return
    if model.encoder_costs == "configured":
        costs = {name: modality.cost_per_piece for name, modality in model.modalities.items()}
    else:
        costs = _of_first_rank(state, run_dir, say)
    for data in (state.train_data, state.validation_data):
        if data is not None:
            data.planner.use_encoder_costs(costs)
    share_encoding(state, costs)


def _of_first_rank(state: TrainState, run_dir: Path, say: Callable[[str], None]) -> dict[str, float]:
    agreed: list[Any] = [None]
    if dist.get_rank() == 0:
        # Rank 0 belongs to the first pipeline stage, which holds the encoders.
        encoders: Any = dict(state.models[0].encoders)
        if state.config.model.encoder_costs == "operations":
            agreed = [{n: passes(trains=_trains(e)) * e.flops_per_piece() for n, e in encoders.items()}]
        else:
            try:
                agreed = [_kept_or_measured(encoders, run_dir / FILE, state.layout.device, say)]
            except ConfigError as error:
                agreed = [str(error)]
    dist.broadcast_object_list(agreed, src=0)
    if isinstance(agreed[0], str):
        raise ConfigError(agreed[0])
    costs: dict[str, float] = agreed[0]
    return costs


def _kept_or_measured(
    encoders: Mapping[str, Encoder], file: Path, device: torch.device, say: Callable[[str], None]
) -> dict[str, float]:
    """Costs from an earlier start of the run, or new ones, which are then written to `file`."""
    kept = read_costs(file)
    if kept.keys() == encoders.keys():
        say(f"encoder costs from {file.name}: {_describe(kept)}")
        return kept
    measured = {name: seconds_per_piece(encoder, device) for name, encoder in encoders.items()}
    say(f"encoder costs, measured: {_describe(measured)}")
    staged = file.with_suffix(".tmp")
    staged.write_text(json.dumps({"seconds_per_piece": measured, "device": _name(device)}, indent=1) + "\n")
    staged.replace(file)
    return measured


def read_costs(file: Path) -> dict[str, float]:
    """Seconds per piece by modality, as an earlier start of a run measured them; empty if there is no file.

    Raises:
        ConfigError: the file is damaged.
    """
    if not file.exists():
        return {}
    try:
        costs = {str(name): float(cost) for name, cost in json.loads(file.read_text())["seconds_per_piece"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        costs = {"": math.nan}
    if not all(0 < cost < math.inf for cost in costs.values()):
        raise ConfigError(
            f"{str(file)!r} is damaged. Delete it to measure the encoders again (the run then continues with other "
            "packs, which changes results by rounding only)."
        )
    return costs


def seconds_per_piece(encoder: Encoder, device: torch.device) -> float:
    """Shortest measured forward time per piece, in seconds; times 3 for an encoder that trains, for the backward pass,
    which is not run.
    """
    generator = torch.Generator(device).manual_seed(0)
    pieces = torch.rand(_PIECES, *encoder.piece_shape, device=device, generator=generator)
    # As in training: layers that draw or count something must not do it here either.
    encoder.eval()
    times = []
    with torch.no_grad():
        for _ in range(1 + _CALLS):
            begun = time.perf_counter()
            encoder(pieces)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begun)
    return passes(trains=_trains(encoder)) * min(times[1:]) / _PIECES


def passes(*, trains: bool) -> int:
    """Operations of a step relative to those of a forward pass."""
    return _TRAINED if trains else 1


def _trains(encoder: Encoder) -> bool:
    return any(parameter.requires_grad for parameter in encoder.parameters())


def _describe(costs: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {1000 * cost:.3g} ms" for name, cost in costs.items()) + " per piece"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
