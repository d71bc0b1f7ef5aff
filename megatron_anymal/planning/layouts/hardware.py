"""What the time model knows of a GPU and its links: one YAML file per GPU, each number with its source."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_anymal.config import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "hardware"


@dataclass(frozen=True)
class Hardware:
    """A GPU, its node and its network. Rates are of one GPU, link rates in one direction.

    Attributes:
        name: display name.
        memory_gb: memory that CUDA reports, in 1e9 bytes (a data sheet's GB are larger units).
        memory_gb_per_s: memory bandwidth in 1e9 bytes per second.
        bf16_tflops: peak of dense bf16 matrix products in 1e12 operations per second.
        fp8_tflops: the same for FP8; 0 if the GPU has none.
        fp32_tflops: the same for fp32.
        bf16_matrix_share: share of the peak that the best matrix product reaches.
        fp8_matrix_share: the same for FP8.
        attention_forward_share: share of the bf16 peak that fused attention reaches on long documents.
        attention_backward_share: the same for its backward pass.
        multiprocessors: number of streaming multiprocessors, over which the tiles of a product are distributed.
        tile: rows and columns of the result that a multiprocessor computes at a time.
        matrix_ramp: multiply-adds along K that a tile loses at its start and end.
        memory_share: fraction of the bytes per second of `memory_gb_per_s` that elementwise kernels reach.
        kernel_us: time in microseconds to start and end a kernel.
        node_gpus: GPUs of a node.
        node_gb_per_s: bandwidth of a GPU to the others of its node, in 1e9 bytes per second.
        network_gb_per_s: bandwidth of a GPU to other nodes, likewise.
        link_share: share of a link's bandwidth that large messages reach.
        node_latency_us: start of a message within a node, in microseconds.
        network_latency_us: the same between nodes.
        matrix_rates: measured products as (m, n, k, 1e12 operations per second); empty: the shape model of `rates`.
    """

    name: str
    memory_gb: float
    memory_gb_per_s: float
    bf16_tflops: float
    fp8_tflops: float
    fp32_tflops: float
    bf16_matrix_share: float
    fp8_matrix_share: float
    attention_forward_share: float
    attention_backward_share: float
    multiprocessors: int
    tile: tuple[int, int]
    matrix_ramp: float
    memory_share: float
    kernel_us: float
    node_gpus: int
    node_gb_per_s: float
    network_gb_per_s: float
    link_share: float
    node_latency_us: float
    network_latency_us: float
    matrix_rates: tuple[tuple[int, int, int, float], ...] = ()

    def peak(self, number_format: str) -> float:
        """Operations per second of dense matrix products at the data sheet's rate: bf16, fp8 or fp32."""
        return 1e12 * float(getattr(self, f"{number_format}_tflops"))

    @cached_property
    def memory_rate(self) -> float:
        """Bytes per second that elementwise kernels read and write."""
        return 1e9 * self.memory_gb_per_s * self.memory_share

    def __hash__(self) -> int:
        # Times are cached by it; two files have different names.
        return hash(self.name)


def number_format(fp8: str, precision: str) -> str:
    """Return the number format of the Llama's layers: fp8, bf16 or fp32.

    Args:
        fp8: `model.fp8`.
        precision: `trainer.precision`.
    """
    return "fp8" if fp8 else {"bf16": "bf16", "32": "fp32"}[precision]


def known_gpus() -> list[str]:
    """Return the names that `load_hardware` takes besides files."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_hardware(name: str, key: str = "--gpu") -> Hardware:
    """Read the description of a GPU.

    Args:
        name: one of `known_gpus`, or a file that `anymal plan --measure` has written.
        key: what names it, for messages.

    Raises:
        ConfigError: no such GPU or file (the message suggests the nearest name), or the file lacks a number.
    """
    path = FOLDER / f"{name.lower()}.yaml"
    if not path.is_file():
        path = Path(name)
        if path.suffix != ".yaml" or not path.is_file():
            near = difflib.get_close_matches(name.lower(), known_gpus(), n=1, cutoff=0.3)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"{key}={name}: no such GPU. {hint}Known: {', '.join(known_gpus())}. Or name a file that `anymal plan "
                "--measure FILE.yaml` has written."
            )
    return _parse(yaml.safe_load(path.read_text()), str(path))


def sources(name: str) -> dict[str, tuple[Any, str]]:
    """Return each entry of a known GPU's file as value and source."""
    body = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return {key: (value, source) for key, (value, source) in body.items()}


def _parse(body: Any, path: str) -> Hardware:
    values: dict[str, Any] = {}
    for field in fields(Hardware):
        entry = body.get(field.name) if isinstance(body, dict) else None
        if entry is None and field.name == "matrix_rates":
            continue
        if not isinstance(entry, list) or len(entry) != 2:
            raise ConfigError(
                f"{path}: {field.name} must be [value, source]. Copy it from a file in planning/hardware, or measure "
                "again with `anymal plan --measure`."
            )
        values[field.name] = entry[0]
    values["tile"] = tuple(values["tile"])
    values["matrix_rates"] = tuple(tuple(row) for row in values.get("matrix_rates", ()))
    return Hardware(**values)
