"""`make parity`: compare every layout with plain torch, then plant every bug; print and save the results.

python -m parity [--layouts 64] [--steps 20] [--report docs/internals/parity.md] [--json runs/parity.json]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from parity.discrete import DISCRETE
from parity.discrete_bugs import DISCRETE_BUGS
from parity.layouts import DPO, SFT, Layout, cover
from parity.planted import BUGS, Bug
from parity.runs import PARAMETER_TOLERANCE, TOLERANCE, Difference
from parity.suite import Suite

# Steps per planted bug: enough for an effect. A clean run of the same layout and length comes first.
BUG_STEPS = 3
# Width of the name column in the printed tables, in characters.
WIDTH = 76


def main() -> int:
    """Run the whole suite. Return 1 if any layout differs from the reference or any bug is missed."""
    parser = argparse.ArgumentParser(prog="parity", description=__doc__)
    parser.add_argument("--layouts", type=int, default=64, help="minimum number of pre-training layouts")
    parser.add_argument("--steps", type=int, default=20, help="training steps per layout")
    parser.add_argument("--report", type=Path, default=Path("docs/internals/parity.md"), help="Markdown report")
    parser.add_argument("--json", type=Path, default=Path("runs/parity.json"), help="machine-readable results")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        differences = run_layouts(Path(folder) / "layouts", arguments.layouts, arguments.steps)
        caught = run_bugs(Path(folder) / "bugs")
    seconds = time.monotonic() - begun
    write_report(arguments.report, differences, caught, arguments.steps, seconds)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(summary(differences, caught, arguments.steps, seconds), indent=1) + "\n")
    wrong = [layout.name for layout, difference in differences.items() if not difference.allowed]
    unseen = [bug.what for bug, (clean, planted) in caught.items() if planted.allowed or not clean.allowed]
    print(f"{len(differences)} layouts, {len(wrong)} differ from the reference: {', '.join(wrong) or 'none'}")
    print(f"{len(caught)} planted bugs, {len(unseen)} not caught: {', '.join(unseen) or 'none'}")
    print(f"{seconds / 60:.1f} minutes; {arguments.report}, {arguments.json}")
    return 1 if wrong or unseen else 0


def run_layouts(folder: Path, count: int, steps: int) -> dict[Layout, Difference]:
    """Run every layout and print one line per layout."""
    suite, layouts = Suite(folder, steps), [*cover(count), *SFT, *DPO, *DISCRETE]
    print(f"{'layout':{WIDTH}} {'processes':>9} {'loss':>9} {'gradient':>9} {'parameter':>9} {'weight':>9} {'left':>9}")
    differences: dict[Layout, Difference] = {}
    begun = time.monotonic()
    for layout in layouts:
        try:
            difference = suite.difference(layout)
        except (AssertionError, pytest.fail.Exception) as error:
            print(f"{layout.name}: {error}", flush=True)
            difference = Difference(math.inf, math.inf, math.inf, math.inf, "the run failed")
        differences[layout] = difference
        left = (time.monotonic() - begun) / len(differences) * (len(layouts) - len(differences))
        mark = "" if difference.allowed else f"   DIFFERS ({difference.where})"
        row = f"{layout.name:{WIDTH}} {layout.processes:>9} {_numbers(difference)} {left / 60:>5.1f} min{mark}"
        print(row, flush=True)
    return differences


def run_bugs(folder: Path) -> dict[Bug, tuple[Difference, Difference]]:
    """Run every planted bug. Return the difference of its layout without and with the bug."""
    suite = Suite(folder, BUG_STEPS)
    bug_differences: dict[Bug, tuple[Difference, Difference]] = {}
    for bug in (*BUGS, *DISCRETE_BUGS):
        clean, planted = suite.difference(bug.layout), suite.difference(bug.layout, bug)
        bug_differences[bug] = clean, planted
        seen = "caught" if clean.allowed and not planted.allowed else "NOT CAUGHT"
        print(f"{bug.what:{WIDTH}} {bug.layout.name:>34} gradient {planted.gradient:.1e}  {seen}", flush=True)
    return bug_differences


def summary(
    differences: dict[Layout, Difference], caught: dict[Bug, tuple[Difference, Difference]], steps: int, seconds: float
) -> dict[str, object]:
    """Contents of runs/parity.json."""
    return {
        "layouts": len(differences),
        "steps": steps,
        "worst_loss_difference": max(d.loss for d in differences.values()),
        "worst_gradient_difference": max(d.gradient for d in differences.values()),
        "worst_parameter_gradient_difference": max(d.parameter for d in differences.values()),
        "worst_weight_difference": max(d.weight for d in differences.values()),
        "planted_bugs": len(caught),
        "caught": sum(clean.allowed and not planted.allowed for clean, planted in caught.values()),
        "minutes": round(seconds / 60, 1),
        "by_layout": {
            layout.name: {"loss": d.loss, "gradient": d.gradient, "parameter": d.parameter, "weight": d.weight}
            for layout, d in differences.items()
        },
    }


def write_report(
    path: Path,
    differences: dict[Layout, Difference],
    caught: dict[Bug, tuple[Difference, Difference]],
    steps: int,
    seconds: float,
) -> None:
    """Write the Markdown report, docs/internals/parity.md."""
    rows = [f"| {layout.name} | {layout.processes} | {_numbers(d, ' | ')} |" for layout, d in differences.items()]
    bugs = [
        f"| {bug.what} | {bug.layout.name} | {clean.gradient:.1e} | {planted.loss:.1e} | {planted.gradient:.1e} | "
        f"{'yes' if clean.allowed and not planted.allowed else '**no**'} |"
        for bug, (clean, planted) in caught.items()
    ]
    versions = f"torch {version('torch')}, megatron-core {version('megatron-core')}, Python {platform.python_version()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""# Parity: every layout computes the same numbers

Generated by `make parity` on {time.strftime("%Y-%m-%d")} ({versions}, CPU, gloo, {seconds / 60:.0f} minutes).

Each row is one run of {steps} steps in fp32 under one parallel layout. It is compared with a reference: the same
training in plain torch, written from AnyMAL's definitions, on one process and one document at a time
(`tests/parity/reference.py`, `objective.py`). A media item yields one to three encoder inputs; with "few-media", most
replicas and micro-batches have no media.

- Pre-training: the selected layouts cover every valid pair of settings of tensor, sequence, pipeline, virtual pipeline,
  context and data parallelism, activation recomputation, media and trained weights at least once, on up to 8
  processes. Projectors and the IMU encoder always train. "frozen", "lora", "partial" and "full" refer to the Llama:
  none of its weights train, adapters on all linear layers, some of its weights, or all of them.
- "sft": conversations. "noise-all" adds NEFTune noise to all embeddings, "noise-text" to text embeddings only. The loss
  is averaged over target tokens or, with "by-sample", over samples.
- "dpo": preference pairs. Training starts from the adapters of a two-step SFT run, which was trained on one process or,
  with "from-", under the named layout; these initial adapters are also the reference model. label_smoothing is 0.05, or
  0 with "sure". The reference model's log-probabilities are recomputed in every step or, with "cached", read from a
  cache when a pair is repeated.
- "rows-new", "rows-all": documents with marks and codes of discrete media in place of some of their words, whose rows
  of the embedding and the head train alone or with the Llama's own. Neither the Llama's vocabulary nor the number of
  marks and codes is divisible by a tensor-parallel size.

The table shows the largest relative differences of each run. The tolerance is {TOLERANCE:.0e} for losses and whole
gradients, and {PARAMETER_TOLERANCE:.0e} for single parameters.

- loss: difference of a step's loss, relative to the loss.
- gradient: norm of the difference of a step's whole gradient, relative to that gradient's norm.
- parameter: the same for the gradient of a single parameter, relative to its largest norm in any step.
- weight: norm of the difference of a parameter after the last step, relative to the parameter's norm.

| layout | processes | loss | gradient | parameter | weight |
|---|---|---|---|---|---|
{chr(10).join(rows)}

## Planted bugs

Each bug is planted on its own, for {BUG_STEPS} steps. It counts as caught if the layout is within the tolerance without
the bug and outside it with the bug.

| bug | layout | gradient, clean | loss, planted | gradient, planted | caught |
|---|---|---|---|---|---|
{chr(10).join(bugs)}
"""
    )


def _numbers(difference: Difference, between: str = " ") -> str:
    values = (difference.loss, difference.gradient, difference.parameter, difference.weight)
    return between.join(f"{value:9.1e}" if between == " " else f"{value:.1e}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
