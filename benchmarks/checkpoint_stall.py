"""How long checkpoints hold training up: written in the background, and not.

    python benchmarks/checkpoint_stall.py --out results.json

On the quickstart's alignment of image, audio and IMU (its model, batches and optimizer, in one process), with a
checkpoint every 20 steps. Rounds without a checkpoint, with one in the background and with one that is waited for take
turns, so that whatever else the machine does meets all alike. A round begins with its checkpoint; its stall is what the
calls for it take, at its beginning and at its end, where a newer checkpoint would wait for it.
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

from examples.quickstart.media import Sizes
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

# The largest stall in the background that is accepted, as a share of the steps between two checkpoints.
BAR = 0.05
# A small quickstart: its sizes of models and batches, fewer files.
FILES = Sizes(train_videos=80, held_out_videos=40, train_audio=48, held_out_audio=24, train_imu=48, held_out_imu=24)
# Kind -> async_save; None: no checkpoint.
KINDS: dict[str, bool | None] = {"none": None, "background": True, "waited for": False}


@dataclass(frozen=True)
class Round:
    """Seconds of one round."""

    steps: list[float]
    # Of the call that begins a checkpoint, and of the wait at the round's end.
    begin: float
    end: float


def configured(name: str) -> RunConfig:
    """A quickstart configuration for one process."""
    one = ["trainer.devices=1", "model.tensor_model_parallel_size=1", "trainer.log_every_n_steps=1000000"]
    return compose(name, default_config_dir(), one).config


def ready(folder: Path) -> tuple[TrainState, ParallelLayout]:
    """The quickstart's alignment, on a Llama of two steps."""
    prepare_quickstart(folder / "runs" / "quickstart", FILES, encoder_steps=20)
    llama = configured("quickstart_llama")
    llama.trainer.max_steps = 2
    layout = initialize(llama)
    fit(build(llama, layout), llama.run_dir)
    return build(configured("quickstart"), layout), layout


class Rounds:
    """Rounds of training with one checkpoint each, or none."""

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
        """One round of a kind."""
        writer, began = self.writers[kind], time.perf_counter()
        if kind != "none":
            writer.start(self.state, self._manifest())
        begin = time.perf_counter() - began
        steps = []
        for number in range(self.every):
            began = time.perf_counter()
            train_step(self.state, *self.batches[number % len(self.batches)])
            writer.report()
            steps.append(time.perf_counter() - began)
        began = time.perf_counter()
        writer.finish()
        return Round(steps, begin, time.perf_counter() - began)

    def _manifest(self) -> Manifest:
        state = self.state
        return Manifest(state.step, 0, state.config.to_dict(), state.llama.to_dict(), "", "", {})


def _no_word(*_: Any) -> None:
    """Nothing to say, nothing to guard."""


def measure(every: int, rounds: int, batch: int) -> dict[str, Any]:
    """Everything, raw seconds included."""
    around = surroundings()
    with tempfile.TemporaryDirectory() as name, chdir(name):
        state, layout = ready(Path(name))
        sides = Rounds(state, Path(name) / "checkpoints", every)
        found: dict[str, list[Round]] = {kind: [] for kind in KINDS}
        for number in range(1 + rounds):
            for kind in list(KINDS)[:: 1 if number % 2 == 0 else -1]:
                one = sides.run(kind)
                # The first of each warms up.
                if number:
                    found[kind].append(one)
        newest, _ = store.newest_valid(Path(name) / "checkpoints" / "background")
        assert newest is not None
        size = sum(path.stat().st_size for path in newest.iterdir())
    step = statistics.median(seconds for one in found["none"] for seconds in one.steps)
    shutdown()
    return {
        **around,
        "device": layout.device.type,
        "every": every,
        "global_batch_size": batch,
        "checkpoint_bytes": size,
        "step_seconds": step,
        "background": summary(found["background"], found["none"], step, every),
        "waited_for": summary(found["waited for"], found["none"], step, every),
        "rounds": {kind: [asdict(one) for one in turns] for kind, turns in found.items()},
    }


def summary(turns: list[Round], without: list[Round], step: float, every: int) -> dict[str, float]:
    """What a kind costs."""
    stall = statistics.median(one.begin + one.end for one in turns)
    steps = [sum(one.steps) / sum(none.steps) - 1 for one, none in zip(turns, without, strict=True)]
    return {
        "stall_seconds": stall,
        "worst_stall_seconds": max(one.begin + one.end for one in turns),
        "stall_in_steps": stall / step,
        "stall_share": stall / (every * step),
        # What the steps beside it take more, of the writing and of all else.
        "slower_steps_share": statistics.median(steps),
    }


def report(found: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [
        f"{found['date']}; {found['machine']}; {found['threads']} threads; load before: {found['load']:.1f}",
        ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"the quickstart's alignment in one process; {found['step_seconds']:.3f} s a step; a checkpoint of "
        f"{found['checkpoint_bytes'] / 2**20:.1f} MiB every {found['every']} steps",
        "",
        f"{'checkpoint':<14}{'stall, s':>10}{'worst, s':>10}{'in steps':>10}{'of 20 steps':>13}{'steps slower':>14}",
    ]
    lines[-1] = lines[-1].replace("of 20 steps", f"of {found['every']} steps".rjust(11))
    for kind in ("background", "waited_for"):
        one = found[kind]
        lines.append(
            f"{kind.replace('_', ' '):<14}{one['stall_seconds']:>10.3f}{one['worst_stall_seconds']:>10.3f}"
            f"{one['stall_in_steps']:>10.2f}{one['stall_share']:>13.2%}{one['slower_steps_share']:>14.2%}"
        )
    within = found["background"]["stall_share"] <= BAR
    return "\n".join([*lines, f"{'within' if within else 'ABOVE'} the bar of {BAR:.0%} in the background"])


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a JSON file for the numbers, raw ones included")
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--rounds", type=int, default=10, help="of each kind, besides one that does not count")
    arguments = parser.parse_args(argv)
    if arguments.every < 1 or arguments.rounds < 1:
        parser.error("--every and --rounds must be at least 1.")
    out = os.path.abspath(arguments.out) if arguments.out else ""
    if out and not Path(out).parent.is_dir():
        parser.error(f"--out: there is no folder {str(Path(out).parent)!r}.")
    batch = configured("quickstart").model.global_batch_size
    found = {
        "command": " ".join(["python benchmarks/checkpoint_stall.py", *argv]),
        **measure(arguments.every, arguments.rounds, batch),
    }
    print(report(found))
    if out:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
