"""Text report of the results, and whether they meet the bars."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any, Optional

import torch
from measuring import surroundings
from shapes import Case

from megatron_anymal import backend

# Bars for the 8B alignment.
MFU_BAR, BASELINE_BAR, FLOOR_BAR = 0.55, 1.3, 0.05
# Bar for every job.
WAIT_BAR = 0.01

NOT_MEANINGFUL = "DRY RUN: tiny sizes on a CPU. These numbers are meaningless."
TITLES = {
    "ours": "megatron_anymal",
    "bare": "bare megatron-core",
    "media": "encoder and projector alone",
    "huggingface": "transformers",
}


def card() -> dict[str, Any]:
    """Date, machine, GPU, and relevant package versions."""
    environment = surroundings()
    features = backend.capabilities()
    for package in ("peft", "transformer-engine", "flash-attn", "apex"):
        environment["versions"][package] = _version(package)
    environment["versions"]["transformer-engine"] = features.transformer_engine or features.transformer_engine_problem
    properties: Any = torch.cuda.get_device_properties(0) if features.cuda_devices else None
    environment["card"] = {
        "name": features.cuda_devices[0] if features.cuda_devices else "no GPU",
        "compute_capability": features.compute_capability,
        "memory_bytes": properties.total_memory if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "cuda": torch.version.cuda,
    }
    return environment


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def bars(case: Case, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars of a case: measured value, required value, and whether it is met (None: no verdict)."""
    ratios, sides = results["ratios"], results["sides"]
    rows = []
    if case.job == "pretrain" and case.llama == "8b":
        rows = [
            _bar("share of the bf16 rate", sides.get("ours", {}).get("share_of_bf16_rate"), MFU_BAR, True),
            _bar("times transformers' tokens/s", _median(ratios, "huggingface_over_ours"), BASELINE_BAR, True),
            _bar(
                "over bare megatron-core with the same encoder and projector",
                _median(ratios, "ours_over_bare_and_media", less=1.0),
                FLOOR_BAR,
                False,
            ),
        ]
    wait = results["data_wait"]
    rows.append(_bar("time waiting for data", wait["share"] if wait else None, WAIT_BAR, False))
    if case.dry_run:
        rows = [{**row, "met": None} for row in rows]
    return rows


def _median(ratios: dict[str, Any], name: str, less: float = 0.0) -> Optional[float]:
    return ratios[name]["median"] - less if name in ratios else None


def _bar(name: str, value: Optional[float], bar: float, at_least: bool) -> dict[str, Any]:
    met = None if value is None else (value >= bar if at_least else value <= bar)
    return {"name": name, "value": value, "bar": bar, "at_least": at_least, "met": met}


def heading(results: dict[str, Any]) -> str:
    """Format machine, versions and GPU limits."""
    limits = results["limits"]
    fp8 = f"{limits['fp8'] / 1e12:.1f} TFLOP/s" if limits["fp8"] else limits["fp8_left_out"]
    lines = [
        f"{results['date']}; {results['machine']}",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        f"limits: product of {limits['product_size']} in bf16 {limits['bf16'] / 1e12:.4g} TFLOP/s; in FP8: {fp8}; "
        f"copy {limits['copy'] / 1e9:.1f} GB/s",
    ]
    return "\n".join([NOT_MEANINGFUL, *lines] if results["dry_run"] else lines)


def table(results: dict[str, Any]) -> str:
    """Format the results of one case."""
    lines = ["", results["name"]]
    if "left_out" in results:
        return "\n".join([*lines, f"  left out: {results['left_out']}"])
    first = results["batches"][0]
    lines += [
        f"  {first['samples']} samples, {first['images']} images, {first['tokens']} tokens, {first['targets']} of them "
        f"targets, in {first['packs']} packs, {first['padded_tokens']} with padding; "
        f"{results['work'][0]['total'] / 1e12:.3g} TFLOP",
        f"  {'':<30}{'s/step':>9}{'quartiles':>18}{'tokens/s':>11}{'of bf16':>9}{'of FP8':>9}{'peak':>11}  recompute",
    ]
    lines += [_row(name, side) for name, side in results["sides"].items()]
    lines += [f"  {TITLES[name]:<30}left out: {why}" for name, why in results["left_out_sides"].items()]
    lines += [f"  {line}" for line in (*_memory(results), *_equality(results), *_counted(results))]
    for name, measured in results["ratios"].items():
        lines.append(
            f"  {name.replace('_', ' ')}: {measured['median']:.3f} ({measured['lower']:.3f} to {measured['upper']:.3f})"
        )
    lines += [_verdict(row) for row in results["bars"]]
    if results.get("profile"):
        lines += _profile(results["profile"])
    return "\n".join(lines)


def _row(name: str, side: dict[str, Any]) -> str:
    seconds = side["seconds"]
    spread = f"{seconds['lower']:.4f}-{seconds['upper']:.4f}"
    rate = side.get("tokens_per_second")
    return (
        f"  {TITLES[name]:<30}{seconds['median']:>9.4f}{spread:>18}{_or_dash(rate, '.0f'):>11}"
        f"{_or_dash(side.get('share_of_bf16_rate'), '.1%'):>9}{_or_dash(side.get('share_of_fp8_rate'), '.1%'):>9}"
        f"{gibibytes(side['peak_memory_bytes']):>11}  {side['recompute']}"
    )


def _or_dash(value: Optional[float], form: str) -> str:
    return "-" if value is None else format(value, form)


def gibibytes(count: Optional[int]) -> str:
    """Format a number of bytes in GiB."""
    return "-" if count is None else f"{count / 2**30:.1f} GiB"


def _memory(results: dict[str, Any]) -> list[str]:
    ours = results["sides"].get("ours")
    if ours is None or ours["peak_memory_bytes"] is None:
        return []
    peak, building = (gibibytes(ours[name]) for name in ("peak_memory_bytes", "build_peak_memory_bytes"))
    return [f"it fits on the GPU: peak memory {peak} in a step, {building} during build"]


def _equality(results: dict[str, Any]) -> list[str]:
    same = results["equality"]
    if same is None:
        return []
    loss, norm = same["loss"], same["gradient_norm"]
    return [
        f"first loss {loss['ours']:.6f} and transformers' {loss['huggingface']:.6f}, gradient norm {norm['ours']:.5f} "
        f"and {norm['huggingface']:.5f}: {'equal' if same['equal'] else 'NOT EQUAL'}"
    ]


def _counted(results: dict[str, Any]) -> list[str]:
    return [
        f"FLOPs of {TITLES[name]}: {row['counted']:.6g} counted by torch, {row['by_hand']:.6g} analytic"
        for name, row in results["counted"].items()
    ]


def _verdict(row: dict[str, Any]) -> str:
    word = {True: "met", False: "MISSED", None: "no verdict"}[row["met"]]
    sign = "at least" if row["at_least"] else "at most"
    return f"  bar: {row['name']} {_or_dash(row['value'], '.4f')} ({sign} {row['bar']}): {word}"


def _profile(profile: dict[str, Any]) -> list[str]:
    idle = "" if profile["idle_share"] is None else f"; the GPU was idle {profile['idle_share']:.1%} of the time"
    lines = [f"  profile of {profile['steps']} steps ({profile['kind']}){idle}"]
    return lines + [
        f"    {row['share']:>6.1%} {row['seconds']:>9.4f} s {row['calls']:>7} x {row['name'][:90]}"
        for row in profile["top"][:10]
    ]
