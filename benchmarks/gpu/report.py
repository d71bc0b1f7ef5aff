"""What people read of the results, and whether they meet the bars."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any, Optional

import torch
from measuring import surroundings
from shapes import Case

from megatron_anymal import backend

# Of the 8B alignment.
MFU_BAR, BASELINE_BAR, FLOOR_BAR = 0.55, 1.3, 0.05
# Of every job.
WAIT_BAR = 0.01

NOT_MEANINGFUL = "DRY RUN: tiny sizes on a CPU. None of these numbers means anything."
TITLES = {
    "ours": "megatron_anymal",
    "bare": "bare megatron-core",
    "media": "encoder and projector alone",
    "huggingface": "transformers",
}


def card() -> dict[str, Any]:
    """The date, the machine, its card and the packages that matter."""
    around = surroundings()
    found = backend.capabilities()
    for package in ("peft", "transformer-engine", "flash-attn", "apex"):
        around["versions"][package] = _version(package)
    around["versions"]["transformer-engine"] = found.transformer_engine or found.transformer_engine_problem
    properties: Any = torch.cuda.get_device_properties(0) if found.cuda_devices else None
    around["card"] = {
        "name": found.cuda_devices[0] if found.cuda_devices else "no GPU",
        "compute_capability": found.compute_capability,
        "memory_bytes": properties.total_memory if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "cuda": torch.version.cuda,
    }
    return around


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def bars(case: Case, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of a case: what was measured, what is wanted, and whether it is met (None: there is no verdict)."""
    ratios, sides = found["ratios"], found["sides"]
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
    wait = found["data_wait"]
    rows.append(_bar("time waiting for data", wait["share"] if wait else None, WAIT_BAR, False))
    if case.dry_run:
        rows = [{**row, "met": None} for row in rows]
    return rows


def _median(ratios: dict[str, Any], name: str, less: float = 0.0) -> Optional[float]:
    return ratios[name]["median"] - less if name in ratios else None


def _bar(name: str, value: Optional[float], bar: float, at_least: bool) -> dict[str, Any]:
    met = None if value is None else (value >= bar if at_least else value <= bar)
    return {"name": name, "value": value, "bar": bar, "at_least": at_least, "met": met}


def heading(found: dict[str, Any]) -> str:
    """Where and with what it was measured, and the card's limits."""
    limits = found["limits"]
    fp8 = f"{limits['fp8'] / 1e12:.1f} TFLOP/s" if limits["fp8"] else limits["fp8_left_out"]
    lines = [
        f"{found['date']}; {found['machine']}",
        ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"limits: product of {limits['product_size']} in bf16 {limits['bf16'] / 1e12:.4g} TFLOP/s; in FP8: {fp8}; "
        f"copy {limits['copy'] / 1e9:.1f} GB/s",
    ]
    return "\n".join([NOT_MEANINGFUL, *lines] if found["dry_run"] else lines)


def table(found: dict[str, Any]) -> str:
    """One case."""
    lines = ["", found["name"]]
    if "left_out" in found:
        return "\n".join([*lines, f"  left out: {found['left_out']}"])
    first = found["batches"][0]
    lines += [
        f"  {first['samples']} samples, {first['images']} images, {first['tokens']} tokens, {first['targets']} of them "
        f"targets, in {first['packs']} packs, {first['padded_tokens']} with padding; "
        f"{found['work'][0]['total'] / 1e12:.3g} TFLOP",
        f"  {'':<30}{'s/step':>9}{'quartiles':>18}{'tokens/s':>11}{'of bf16':>9}{'of FP8':>9}{'peak':>11}  recompute",
    ]
    lines += [_row(name, side) for name, side in found["sides"].items()]
    lines += [f"  {TITLES[name]:<30}left out: {why}" for name, why in found["left_out_sides"].items()]
    lines += [f"  {line}" for line in (*_memory(found), *_equality(found), *_counted(found))]
    for name, measured in found["ratios"].items():
        lines.append(
            f"  {name.replace('_', ' ')}: {measured['median']:.3f} ({measured['lower']:.3f} to {measured['upper']:.3f})"
        )
    lines += [_verdict(row) for row in found["bars"]]
    if found.get("profile"):
        lines += _profile(found["profile"])
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
    """Bytes for people."""
    return "-" if count is None else f"{count / 2**30:.1f} GiB"


def _memory(found: dict[str, Any]) -> list[str]:
    ours = found["sides"].get("ours")
    if ours is None or ours["peak_memory_bytes"] is None:
        return []
    peak, building = (gibibytes(ours[name]) for name in ("peak_memory_bytes", "build_peak_memory_bytes"))
    return [f"it fits the card: peak memory {peak} in a step, {building} while built"]


def _equality(found: dict[str, Any]) -> list[str]:
    same = found["equality"]
    if same is None:
        return []
    loss, norm = same["loss"], same["gradient_norm"]
    return [
        f"first loss {loss['ours']:.6f} and transformers' {loss['huggingface']:.6f}, gradient norm {norm['ours']:.5f} "
        f"and {norm['huggingface']:.5f}: {'the same work' if same['equal'] else 'NOT THE SAME'}"
    ]


def _counted(found: dict[str, Any]) -> list[str]:
    return [
        f"products of {TITLES[name]}: {row['counted']:.6g} counted by torch, {row['by_hand']:.6g} by hand"
        for name, row in found["counted"].items()
    ]


def _verdict(row: dict[str, Any]) -> str:
    word = {True: "met", False: "MISSED", None: "no verdict"}[row["met"]]
    sign = "at least" if row["at_least"] else "at most"
    return f"  bar: {row['name']} {_or_dash(row['value'], '.4f')} ({sign} {row['bar']}): {word}"


def _profile(found: dict[str, Any]) -> list[str]:
    idle = "" if found["idle_share"] is None else f"; the card was idle {found['idle_share']:.1%} of the time"
    lines = [f"  profile of {found['steps']} steps ({found['kind']}){idle}"]
    return lines + [
        f"    {row['share']:>6.1%} {row['seconds']:>9.4f} s {row['calls']:>7} x {row['name'][:90]}"
        for row in found["top"][:10]
    ]
