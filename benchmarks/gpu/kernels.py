"""Kernels of a Llama's layer and output layer from all installed libraries: RMSNorm, SwiGLU, RoPE, attention within
packed documents and cross-entropy, in eager torch, torch.compile, flex attention, Transformer Engine, flash-attn, apex.

Reports milliseconds of forward and of forward with backward, and the minimum bytes or operations per second relative to
the GPU's limits. Bytes: RMSNorm 2 x its input forward, 5 x with backward; SwiGLU 1.5 x and 4 x; RoPE 2 x and 4 x;
cross-entropy 1 x and 3 x. Operations of attention: 2 x heads x head size x sum of L^2 over documents of L tokens, 3.5 x
with backward. The output and gradients of each kernel are first compared with eager torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from command import base_parser, parse
from limits import measure_limits, seconds_of
from parts import Part, PartSizes, make_parts
from torch import Tensor

from megatron_anymal import backend

# Documents of a pack of 8192 tokens: images with captions, and a few longer ones.
DOCUMENTS = (84, 264, 120, 176, 700, 150, 210, 98, 114, 132) * 4
DRY_SIZES = PartSizes((5, 9, 2, 16), 32, 48, 4, 2, 8, 64)
# Largest relative distance (in norm) from eager torch: two roundings in bf16.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def measure_part(part: Part, limits: dict[str, Any], dtype: torch.dtype, *, dry_run: bool) -> dict[str, Any]:
    """Measure every candidate, or record why it cannot be measured."""
    rows: dict[str, Any] = {}
    expected: Optional[list[Tensor]] = None
    for name, make in part.candidates.items():
        inputs = [tensor.clone().requires_grad_() for tensor in part.inputs]
        try:
            call = make(**part.given)
            results = _results(call, inputs)
            expected = expected or results
            apart = [_distance(a, b) for a, b in zip(results, expected)]
            del results
            rows[name] = {
                "apart": max(apart),
                "equal": max(apart) <= TOLERANCE[dtype],
                **_times(part, call, inputs, limits, dry_run=dry_run),
            }
        except ImportError as error:
            rows[name] = {"absent": str(error)}
        except Exception as error:
            # A library built for another torch may fail in any way: still measure the others.
            rows[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return rows


def _results(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output, and the gradients of its sum weighted by a fixed pattern."""
    out = call(*inputs)
    out.backward(_gradient(out))
    gradients = [tensor.grad for tensor in inputs]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), *(g.clone() for g in gradients if g is not None)]


def _gradient(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _times(
    part: Part, call: Callable[..., Tensor], inputs: Sequence[Tensor], limits: dict[str, Any], *, dry_run: bool
) -> dict[str, Any]:
    gradient = _gradient(call(*inputs))

    def forward() -> None:
        with torch.no_grad():
            call(*inputs)

    def both() -> None:
        for tensor in inputs:
            tensor.grad = None
        call(*inputs).backward(gradient)

    limit = limits["bf16"] if part.counts == "operations" else limits["copy"]
    times: dict[str, Any] = {}
    for name, timed, amount in (("forward", forward, part.forward), ("forward_and_backward", both, part.both)):
        seconds = seconds_of(timed, inputs[0].device, dry_run=dry_run)
        times[name] = {"seconds": seconds, "per_second": amount / seconds, "share_of_limit": amount / seconds / limit}
    return times


def table(name: str, part: Part, results: dict[str, Any]) -> str:
    """Format the results of one part as text."""
    unit = "TFLOP/s" if part.counts == "operations" else "GB/s"
    scale = 1e12 if part.counts == "operations" else 1e9
    lines = ["", f"{name:<24}{'forward ms':>12}{unit:>10}{'limit':>8}{'with bwd ms':>14}{unit:>10}{'limit':>8}"]
    for candidate, row in results.items():
        if "equal" not in row:
            lines.append(f"  {candidate:<22}{row.get('absent') or row.get('failed')}")
            continue
        line = f"  {candidate:<22}"
        for times, width in ((row["forward"], 12), (row["forward_and_backward"], 14)):
            line += f"{times['seconds'] * 1e3:>{width}.3f}{times['per_second'] / scale:>10.1f}"
            line += f"{times['share_of_limit']:>8.1%}"
        lines.append(line + ("" if row["equal"] else f"  NOT EQUAL: {row['apart']:.1e} from eager torch"))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code (1 if a candidate's results differ)."""
    arguments = parse(base_parser(__doc__), "kernels.py", argv)
    dry_run = arguments.dry_run
    # Slow imports come after the argument checks.
    from report import card, heading

    if dry_run:
        torch.compiler.set_stance("force_eager")
    device, dtype = backend.device(), torch.float32 if dry_run else torch.bfloat16
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/gpu/kernels.py", *argv]),
        **card(),
        "dry_run": dry_run,
        "limits": measure_limits(device, dry_run=dry_run),
        "parts": {},
    }
    print(heading(results), flush=True)
    sizes = DRY_SIZES if dry_run else PartSizes(DOCUMENTS)
    for name, part in make_parts(sizes, device, dtype).items():
        results["parts"][name] = measure_part(part, results["limits"], dtype, dry_run=dry_run)
        print(table(name, part, results["parts"][name]), flush=True)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    rows = [row for part in results["parts"].values() for row in part.values()]
    return 0 if all(row.get("equal", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
