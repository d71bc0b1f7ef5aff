"""Inputs of the goodput model: their defaults with sources, and the job that they describe.

Sources: Llama 3 is "The Llama 3 Herd of Models", arXiv:2407.21783; MegaScale is "MegaScale: Scaling Large Language
Model Training to More Than 10,000 GPUs", NSDI 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

from megatron_anymal.config import CheckpointConfig, ConfigError
from megatron_anymal.planning.goodput import FailingJob, PeerSnapshots, RecoveryTime

# Numbers of GPUs if none is given.
GPUS = (16, 64, 256, 1024, 4096, 16384)
# Stall of a save in steps, measured: docs/internals/benchmarks.md, Checkpoints.
STALL_STEPS = 0.70
# Llama 3: at most 4 GB of state per GPU, at 2 TB/s for 16,384 GPUs.
_STATE_SECONDS = 4e9 * 16384 / 2e12


@dataclass(frozen=True)
class Input:
    """An input of the model."""

    # Name in the output; the option has hyphens for the underscores. The name of a time ends with its unit.
    name: str
    # What it is.
    help: str
    # Value if neither given nor measured; None: depends on other inputs, or there is none.
    default: Optional[float]
    # Where the default comes from.
    source: str
    # Whether it must be above 0, rather than 0 or more.
    positive: bool = False
    # Whether it must be a whole number.
    whole: bool = False
    # Largest valid value.
    highest: float = math.inf

    @property
    def option(self) -> str:
        """The command-line option."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def unit(self) -> str:
        """Unit of the value, in capitals."""
        units = {"hours": "HOURS", "seconds": "SECONDS", "every": "STEPS", "node": "NUMBER"}
        return units.get(self.name.rpartition("_")[2], "SHARE")


INPUTS = (
    Input(
        "mtbf_per_gpu_hours",
        "mean time between failures of a job, times its GPUs",
        54 * 24 * 16384 / 419,
        "419 unexpected interruptions in 54 days on 16,384 H100 GPUs (Llama 3, 3.3.4)",
        positive=True,
    ),
    Input("mtbf_per_node_hours", "the same, times its nodes; instead of the above", None, "", positive=True),
    Input("gpus_per_node", "GPUs of a node", 8, "an H100 server (Llama 3, 3.3.1)", positive=True, whole=True),
    Input(
        "step_seconds",
        "time of one step",
        6 * 405e9 * 2**24 / (16384 * 400e12),
        "6 x 405e9 parameters x 16 Mi tokens at 400 TFLOP/s on each of 16,384 GPUs (Llama 3, Table 4)",
        positive=True,
    ),
    Input(
        "save_every",
        "steps between saves at present",
        CheckpointConfig().every_n_train_steps,
        "exp_manager.checkpoint.every_n_train_steps",
        positive=True,
        whole=True,
    ),
    Input(
        "stall_seconds",
        "time for which a save stalls training",
        None,
        f"{STALL_STEPS:.2f} steps, measured on CPUs (docs/internals/benchmarks.md, Checkpoints)",
    ),
    Input(
        "write_seconds",
        "time to write a save after the stall, while steps continue",
        _STATE_SECONDS,
        "at most 4 GB per GPU, 16,384 GPUs, 2 TB/s of storage (Llama 3, 3.3.1)",
    ),
    Input(
        "detection_seconds",
        "time from a failure until all processes have been ended",
        1.0,
        "a killed process, measured on two CPU cores (docs/operations/failures.md, Soak test)",
    ),
    Input(
        "processes_seconds",
        "time from then until all processes run again and have built the model",
        2.0,
        "four processes forked from the standby process, measured on two CPU cores (docs/internals/benchmarks.md, "
        "Robustness)",
    ),
    Input(
        "groups_seconds",
        "time to connect their process groups",
        30.0,
        "more than 10,000 GPUs (MegaScale)",
    ),
    Input(
        "restore_seconds",
        "time to load the checkpoint",
        _STATE_SECONDS,
        "as for writing it (Llama 3, 3.3.1)",
    ),
    Input(
        "first_step_seconds",
        "time that the first step takes beyond a usual one",
        None,
        "one step, assumed",
    ),
    Input(
        "lost_node_seconds",
        "time that a lost node adds to a recovery",
        600.0,
        "to find and diagnose it: less than 10 minutes (MegaScale)",
    ),
    Input(
        "lost_node_share",
        "share of failures that lose a node",
        289 / 419,
        "GPUs and parts of hosts: 289 of 419 interruptions (Llama 3, Table 5)",
        highest=1.0,
    ),
    Input(
        "peer_every",
        "steps between snapshots in the memory of other nodes",
        None,
        "no snapshots",
        positive=True,
        whole=True,
    ),
    Input("peer_stall_seconds", "time for which a snapshot stalls training", None, "as for a save: the same copy"),
    Input(
        "peer_restore_seconds",
        "time to load a snapshot, instead of restore_seconds",
        1.0,
        "4 GB per GPU at 400 Gbit/s take 0.1 s (Llama 3, 3.3.1), rounded up",
    ),
    Input(
        "peer_coverage",
        "share of failures that leave all snapshots in some node's memory",
        1 - 35 / 419,
        "all but network switches and cables, 35 of 419 interruptions (Llama 3, Table 5)",
        highest=0.9999,
    ),
)


@dataclass(frozen=True)
class Value:
    """Value of an input."""

    # The value, in the unit that the name of the input ends with.
    number: float
    # Where it comes from: given, measured or default, with the details.
    origin: str


def resolve(given: Mapping[str, Optional[float]], measured: Mapping[str, Value]) -> dict[str, Value]:
    """Choose each input's value: as given, else as measured, else the default.

    Args:
        given: name -> value of the command line; None or absent: not given.
        measured: name -> value measured in a run.

    Returns:
        Values by name; without those of snapshots if there are none, and with one of the two MTBF.

    Raises:
        ConfigError: a value is out of range, or does not go with another one.
    """
    values: dict[str, Value] = {}
    for item in INPUTS:
        number = given.get(item.name)
        if number is not None:
            values[item.name] = Value(_checked(item, number), "given")
        elif item.name in measured:
            values[item.name] = measured[item.name]
        elif item.default is not None:
            values[item.name] = Value(item.default, f"default: {item.source}")
    if "mtbf_per_node_hours" in values:
        del values["mtbf_per_gpu_hours"]
    _derive(values)
    _check_peers(given, values)
    return {item.name: values[item.name] for item in INPUTS if item.name in values}


def nodes_of(values: Mapping[str, Value], gpus: int) -> int:
    """Number of nodes that hold a number of GPUs."""
    return math.ceil(gpus / values["gpus_per_node"].number)


def job_of(values: Mapping[str, Value], gpus: int) -> FailingJob:
    """Describe a job on a number of GPUs for the model.

    Args:
        values: as returned by `resolve`.
    """
    number = {name: value.number for name, value in values.items()}
    if "mtbf_per_node_hours" in number:
        mtbf = number["mtbf_per_node_hours"] / nodes_of(values, gpus)
    else:
        mtbf = number["mtbf_per_gpu_hours"] / gpus
    phases = ("detection", "processes", "groups", "first_step")
    shared = sum(number[f"{phase}_seconds"] for phase in phases)

    def recovery(restore: float) -> RecoveryTime:
        return RecoveryTime(shared + restore, number["lost_node_seconds"], number["lost_node_share"])

    peers = None
    if "peer_every" in number:
        peers = PeerSnapshots(
            int(number["peer_every"]),
            number["peer_stall_seconds"],
            number["peer_coverage"],
            recovery(number["peer_restore_seconds"]),
        )
    return FailingJob(
        3600.0 * mtbf,
        number["step_seconds"],
        number["stall_seconds"],
        number["write_seconds"],
        recovery(number["restore_seconds"]),
        peers,
    )


def _checked(item: Input, number: float) -> float:
    if not math.isfinite(number):
        raise ConfigError(f"{item.option}={number} is not a finite number.")
    if number < 0 or (item.positive and number == 0):
        raise ConfigError(f"{item.option}={number:g} must be {'above 0' if item.positive else '0 or more'}.")
    if number > item.highest:
        raise ConfigError(f"{item.option}={number:g} must be at most {item.highest:g}.")
    return number


def _derive(values: dict[str, Value]) -> None:
    """Add the defaults that depend on other inputs."""
    step = values["step_seconds"].number
    sources = {item.name: f"default: {item.source}" for item in INPUTS}
    values.setdefault("stall_seconds", Value(STALL_STEPS * step, sources["stall_seconds"]))
    values.setdefault("first_step_seconds", Value(step, sources["first_step_seconds"]))
    values.setdefault("peer_stall_seconds", Value(values["stall_seconds"].number, sources["peer_stall_seconds"]))


def _check_peers(given: Mapping[str, Optional[float]], values: dict[str, Value]) -> None:
    """Check the settings of snapshots; remove them if there are no snapshots."""
    if "peer_every" not in values:
        for item in INPUTS:
            if item.name.startswith("peer_"):
                if given.get(item.name) is not None:
                    raise ConfigError(f"{item.option} has no effect without --peer-every, the steps between snapshots.")
                values.pop(item.name, None)
        return
    every, save_every = int(values["peer_every"].number), int(values["save_every"].number)
    if save_every % every:
        raise ConfigError(
            f"--save-every={save_every} must be a multiple of --peer-every={every}: a save follows a snapshot. "
            f"Try --save-every={every * max(1, round(save_every / every))}."
        )
