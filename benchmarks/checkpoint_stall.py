"""Measure how long checkpoints stall training when written asynchronously and synchronously.

    python benchmarks/checkpoint_stall.py --out results.json

Runs the quickstart's alignment of image, audio and IMU (its model, batches and optimizer, in one process), with a
checkpoint every 20 steps. Rounds without a checkpoint, with an asynchronous and with a synchronous one alternate, so
that other load on the machine affects all of them equally. A round begins with its checkpoint; its stall is the time
spent in checkpoint calls at the beginning of the round and at the end, when the next checkpoint would wait for it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import surroundings

from examples.quickstart.media import QuickstartSizes
from examples.quickstart.prepare import prepare_quickstart
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.async_writer import CheckpointWriter
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.config import CheckpointConfig, RunConfig
from megatron_anymal.config.compose import compose, default_config_dir
from megatron_anymal.parallel import ParallelLayout, initialize, shutdown
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.loop import fit
from megatron_anymal.train.step import train_step

# Largest acceptable asynchronous stall, as a share of the steps between two checkpoints.
BAR = 0.05
# A small quickstart: same model and batch sizes, fewer files.
FILES = QuickstartSizes(
    train_videos=80, held_out_videos=40, train_audio=48, held_out_audio=24, train_imu=48, held_out_imu=24
)
# Kind of round -> async_save; None: no checkpoint.
KINDS: dict[str, bool | None] = {"none": None, "background": True, "waited for": False}


@dataclass(frozen=True)
class Round:
    """Seconds of one round."""

    steps: list[float]
    # The call that begins a checkpoint, and the wait at the end of the round.
    begin: float
    end: float


def configured(name: str) -> RunConfig:
    """Compose a quickstart configuration for one process."""
    one = ["trainer.devices=1", "model.tensor_model_parallel_size=1", "trainer.log_every_n_steps=1000000"]
    return compose(name, default_config_dir(), one).config


def ready(folder: Path) -> tuple[TrainState, ParallelLayout]:
    """Build the quickstart's alignment, on a Llama trained for two steps."""
    prepare_quickstart(folder / "runs" / "quickstart", FILES, encoder_steps=20)
    llama = configured("quickstart_llama")
    llama.trainer.max_steps = 2
    layout = initialize(llama)
    fit(build(llama, layout), llama.run_dir)
    return build(configured("quickstart"), layout), layout


class Rounds:
    """Rounds of training with one checkpoint or none."""

    def __init__(self, state: TrainState, folder: Path, every: int, batches: int = 8) -> None:
        self.state, self.every = state, every
        data = state.train_data
        plans = [data.planner.plan(number) for number in range(batches)]
        self.batches = [(plan, [data.reader[m] for m in plan.of_replica(0)]) for plan in plans]
        self.writers = {
            kind: CheckpointWriter(
                folder / kind, CheckpointConfig(async_save=kind == "background", keep_last=1), _no_word, _no_word
            )
            for kind in KINDS
        }

    def run(self, kind: str) -> Round:
        """Run one round of a kind."""
        writer, begun = self.writers[kind], time.perf_counter()
        if kind != "none":
            writer.start(self.state, self._manifest())
        begin = time.perf_counter() - begun
        steps = []
        for number in range(self.every):
            begun = time.perf_counter()
            train_step(self.state, *self.batches[number % len(self.batches)])
            writer.report()
            steps.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        writer.finish()
        return Round(steps, begin, time.perf_counter() - begun)

    def _manifest(self) -> Manifest:
        state = self.state
        return Manifest(state.step, 0, state.config.to_dict(), state.llama.to_dict(), "", "", {})


def _no_word(*_: Any) -> None:
    """No-op callback."""


def measure(every: int, rounds: int, batch: int) -> dict[str, Any]:
    """Run all measurements; returns the results with raw seconds."""
    environment = surroundings()
    with tempfile.TemporaryDirectory() as name, chdir(name):
        state, layout = ready(Path(name))
        sides = Rounds(state, Path(name) / "checkpoints", every)
        results: dict[str, list[Round]] = {kind: [] for kind in KINDS}
        for number in range(1 + rounds):
            for kind in list(KINDS)[:: 1 if number % 2 == 0 else -1]:
                result = sides.run(kind)
                # The first round of each kind is a warm-up.
                if number:
                    results[kind].append(result)
        newest, _ = store.newest_valid(Path(name) / "checkpoints" / "background")
        assert newest is not None
        size = sum(path.stat().st_size for path in newest.iterdir())
    step = statistics.median(seconds for result in results["none"] for seconds in result.steps)
    shutdown()
    return {
        **environment,
        "device": layout.device.type,
        "every": every,
        "global_batch_size": batch,
        "checkpoint_bytes": size,
        "step_seconds": step,
        "background": summary(results["background"], results["none"], step, every),
        "waited_for": summary(results["waited for"], results["none"], step, every),
        "rounds": {kind: [asdict(result) for result in turns] for kind, turns in results.items()},
    }


def summary(turns: list[Round], without: list[Round], step: float, every: int) -> dict[str, float]:
    """Summarize the cost of one kind of checkpoint."""
    stall = statistics.median(one.begin + one.end for one in turns)
    steps = [sum(one.steps) / sum(none.steps) - 1 for one, none in zip(turns, without, strict=True)]
    return {
        "stall_seconds": stall,
        "worst_stall_seconds": max(one.begin + one.end for one in turns),
        "stall_in_steps": stall / step,
        "stall_share": stall / (every * step),
        # Slowdown of the steps during the round, by writing or anything else.
        "slower_steps_share": statistics.median(steps),
    }


def report(results: dict[str, Any]) -> str:
    """Format the results as text."""
    lines = [
        f"{results['date']}; {results['machine']}; {results['threads']} threads; load before: {results['load']:.1f}",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        f"the quickstart's alignment in one process; {results['step_seconds']:.3f} s per step; a checkpoint of "
        f"{results['checkpoint_bytes'] / 2**20:.1f} MiB every {results['every']} steps",
        "",
        f"{'checkpoint':<14}{'stall, s':>10}{'worst, s':>10}{'in steps':>10}{'of 20 steps':>13}{'steps slower':>14}",
    ]
    lines[-1] = lines[-1].replace("of 20 steps", f"of {results['every']} steps".rjust(11))
    for kind in ("background", "waited_for"):
        one = results[kind]
        lines.append(
            f"{kind.replace('_', ' '):<14}{one['stall_seconds']:>10.3f}{one['worst_stall_seconds']:>10.3f}"
            f"{one['stall_in_steps']:>10.2f}{one['stall_share']:>13.2%}{one['slower_steps_share']:>14.2%}"
        )
    within = results["background"]["stall_share"] <= BAR
    return "\n".join([*lines, f"{'within' if within else 'ABOVE'} the bar of {BAR:.0%} for background checkpoints"])


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file for the results, including raw numbers")
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds of each kind, after one warm-up round")
    arguments = parser.parse_args(argv)
    if arguments.every < 1 or arguments.rounds < 1:
        parser.error("--every and --rounds must be at least 1.")
    out = os.path.abspath(arguments.out) if arguments.out else ""
    if out and not Path(out).parent.is_dir():
        parser.error(f"--out: there is no folder {str(Path(out).parent)!r}.")
    batch = configured("quickstart").model.global_batch_size
    results = {
        "command": " ".join(["python benchmarks/checkpoint_stall.py", *argv]),
        **measure(arguments.every, arguments.rounds, batch),
    }
    print(report(results))
    if out:
        Path(out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
