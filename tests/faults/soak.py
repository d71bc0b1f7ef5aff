"""Soak test: train with one fault per minute, at a random time, and compare with a run without faults.

    PYTHONPATH=.:tests:tests/faults:benchmarks python -m soak --minutes 20 --out results.json

The faults kill or stop a rank, kill a loader process, ask the launcher to stop, or kill the launcher with all its
children (the keeper of its memory is not one of them). A launcher that has ended is restarted. With --nodes 2 or more,
each fault kills the launcher of a node with all its processes; a spare node takes its place, and another spare is
started. Node 0, which cannot be replaced, is started again. Prints the number of steps that differ, which must be 0,
and the effective-training-time ratio; the exit code is 1 if any step differs. At one fault per minute, failures are
about a thousand times as frequent as on real machines: the ratio shows the cost of restarts in this test, not the
loss in a real run.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Optional

import psutil
from launched import differences, launch, rank_processes, write_config
from measuring import surroundings
from ports import free_port
from test_sigkill import figures, kill, steps_of
from tiny import make_shards, make_tokenizer

from megatron_anymal.launcher.goodput import effective_time
from megatron_anymal.resilience.events import read
from megatron_anymal.resilience.exit_codes import Exit

# Settings of both runs. The soaked run's length is not known in advance, so nothing may depend on it.
_SETTINGS = ("model.optim.sched.name=constant", "resilience.hang_timeout=5")
_FAULTS = ("rank killed", "rank stopped", "loader killed", "asked to stop", "all killed")


def main() -> int:
    """Run the soak test and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=20.0, help="duration of the run with faults")
    parser.add_argument("--seconds-between", type=float, default=60.0, help="one fault in each interval of this length")
    parser.add_argument("--processes", type=int, default=4, help="ranks")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints, and between validations")
    parser.add_argument("--nodes", type=int, default=1, help="nodes, which share the ranks; above 1, nodes are lost")
    parser.add_argument(
        "--faults", nargs="+", choices=_FAULTS, help="on one node: kinds of faults (default: all of them)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and their times")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {str(options.out.absolute().parent)!r}.")
    if options.faults and options.nodes > 1:
        parser.error("--faults has no effect with --nodes, where whole nodes are lost. Leave one of them out.")
    around = surroundings()
    folder = Path(tempfile.mkdtemp(prefix="anymal_soak_"))
    print(f"working in {folder}", flush=True)
    tokenizer = make_tokenizer(folder / "tokenizer")
    train = make_shards(folder / "mixed", tokenizer, 40, ("image", "audio", "imu", "text", "mixed"))
    write_config(folder, train, make_shards(folder / "text", tokenizer, 24, ("text",)), tokenizer, 1000, options.every)
    kinds = options.faults or list(_FAULTS)
    kind = partial(NodesSoak, nodes=options.nodes) if options.nodes > 1 else partial(Soak, kinds=kinds)
    soak = kind(folder, options.processes, random.Random(options.seed), options.seconds_between)
    soak.run(options.minutes * 60)
    statistics = soak.compare()
    if options.out:
        command = " ".join(["python -m soak", *sys.argv[1:]])
        options.out.write_text(
            json.dumps({"command": command, **around, **vars(options), **statistics}, default=str, indent=1)
        )
    return 1 if statistics["steps_that_differ"] or statistics["tensors_that_differ"] else 0


class Soak:
    """One run with random faults.

    Args:
        between: length in seconds of the intervals with one fault each, at a random time.
        kinds: of the faults.
    """

    def __init__(
        self,
        folder: Path,
        processes: int,
        dice: random.Random,
        between: float,
        kinds: Sequence[str] = _FAULTS,
    ) -> None:
        self.folder, self.processes, self.dice, self.between, self.kinds = folder, processes, dice, between, kinds
        self.run_dir = folder / "soaked"
        self.done: Counter[str] = Counter()
        self.codes: Counter[int] = Counter()
        self.process = self._launch()

    def run(self, seconds: float) -> None:
        """Cause faults for `seconds`, then stop the run gracefully."""
        begun = time.monotonic()
        end, due, seen = begun + seconds, begun + self._next_fault(), 0
        while time.monotonic() < end:
            time.sleep(min(0.1, self.between / 10))
            if self.process.poll() is not None:
                self._restart()
            # A fault that is due before the run has made progress is delayed: three failures in a row without progress
            # count as a crash loop. Later faults keep their times.
            if time.monotonic() >= due and max(steps_of(self.run_dir), default=0) > seen:
                self._inject_fault()
                seen, due = max(steps_of(self.run_dir), default=0), begun + self._next_fault()
        while self.process.poll() is None or self.process.returncode != Exit.REQUEUE:
            if self.process.poll() is not None:
                self._restart()
            steps = len(steps_of(self.run_dir))
            while self.process.poll() is None and len(steps_of(self.run_dir)) <= steps:
                time.sleep(0.2)
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(300)

    def compare(self) -> dict[str, Any]:
        """Train the same steps without faults; print and return statistics and differences."""
        reached = max(steps_of(self.run_dir))
        alone = self.folder / "alone"
        length = f"trainer.max_steps={reached}"
        process = launch(self.folder, alone, self.processes, *_SETTINGS, length, log=self.folder / "alone.log")
        assert process.wait(3600) == Exit.DONE, (self.folder / "alone.log").read_text()[-3000:]
        soaked = [row for row in figures(self.run_dir) if "loss" in row]
        whole = [row for row in figures(alone) if "loss" in row]
        events = read(self.run_dir)
        spent = effective_time(self.run_dir, events, complete=True, kept=reached)
        undisturbed = effective_time(alone, read(alone), complete=True, kept=reached)
        statistics = {
            "faults": dict(self.done),
            "launchers_exit_codes": dict(self.codes),
            "attempts": len([event for event in events if event["kind"] == "start" and event["rank"] < 0]),
            "steps": reached,
            "steps_that_differ": sum(a != b for a, b in zip(soaked, whole)) + abs(len(soaked) - len(whole)),
            "tensors_that_differ": len(differences(self.run_dir, alone)),
            "effective_time_ratio": spent.ratio,
            "effective_time_ratio_without_faults": undisturbed.ratio,
            "productive_seconds": spent.productive,
            "wall_seconds": spent.wall,
        }
        for name, value in statistics.items():
            print(f"{name.replace('_', ' ')}: {value}", flush=True)
        return statistics

    def _launch(self) -> subprocess.Popen[bytes]:
        log = self.folder / "soaked.log"
        return launch(self.folder, self.run_dir, self.processes, *_SETTINGS, "trainer.max_steps=1000000", log=log)

    def _restart(self) -> None:
        code = self.process.returncode
        self.codes[code] += 1
        if code not in (Exit.REQUEUE, -signal.SIGKILL):
            sys.exit(f"the launcher ended with {code}:\n{(self.folder / 'soaked.log').read_text()[-3000:]}")
        self.process = self._launch()

    def _next_fault(self) -> float:
        """Return when the next fault is due, in seconds from the start."""
        return (self.done.total() + self.dice.random()) * self.between

    def _inject_fault(self) -> None:
        faults: dict[str, Callable[[], None]] = {
            "rank killed": lambda: self._signal_rank(signal.SIGKILL),
            "rank stopped": lambda: self._signal_rank(signal.SIGSTOP),
            "loader killed": self._kill_loader,
            "asked to stop": lambda: self.process.send_signal(signal.SIGTERM),
            "all killed": lambda: kill(self.process),
        }
        name = self.dice.choice(self.kinds)
        with suppress(psutil.Error, ProcessLookupError, IndexError):
            faults[name]()
            self.done[name] += 1
            print(f"{time.strftime('%H:%M:%S')} step {max(steps_of(self.run_dir), default=0)}: {name}", flush=True)

    def _ranks(self) -> list[psutil.Process]:
        return [psutil.Process(pid) for pid in rank_processes(self.process.pid).values()]

    def _signal_rank(self, number: signal.Signals) -> None:
        self.dice.choice(self._ranks()).send_signal(number)

    def _kill_loader(self) -> None:
        self.dice.choice(self.dice.choice(self._ranks()).children()).kill()


class NodesSoak(Soak):
    """A run on several nodes that loses one of them at a time.

    Args:
        nodes: number of nodes, which share the processes.
    """

    def __init__(self, folder: Path, processes: int, dice: random.Random, between: float, nodes: int) -> None:
        self.nodes = nodes
        self.endpoint = f"127.0.0.1:{free_port()}"
        # The launcher of each node, and the spare one.
        self.launchers: dict[int, subprocess.Popen[bytes]] = {}
        super().__init__(folder, processes, dice, between)
        self.launchers |= {node: self._node(node) for node in range(1, nodes)}
        self.spare = self._node(None)

    def _launch(self) -> subprocess.Popen[bytes]:
        self.launchers[0] = self._node(0)
        return self.launchers[0]

    def _node(self, node: Optional[int]) -> subprocess.Popen[bytes]:
        position = "--spare" if node is None else f"--node-rank={node}"
        per_node = self.processes // self.nodes
        more = (*_SETTINGS, "trainer.max_steps=1000000", f"trainer.num_nodes={self.nodes}")
        # The same layout as in the run on one node.
        tensor = f"model.tensor_model_parallel_size={1 + self.processes // 4}"
        options = [position, f"--rdzv-endpoint={self.endpoint}", "--local-addr=127.0.0.1", "--rdzv-timeout=120"]
        log = self.folder / f"node_{'spare' if node is None else node}.log"
        return launch(self.folder, self.run_dir, per_node, *more, tensor, log=log, node=options)

    def _inject_fault(self) -> None:
        node = self.dice.randrange(self.nodes)
        kill(self.launchers[node])
        if node == 0:
            self.process = self._launch()
        else:
            self.launchers[node], self.spare = self.spare, self._node(None)
        self.done[f"node {node} lost"] += 1
        print(
            f"{time.strftime('%H:%M:%S')} step {max(steps_of(self.run_dir), default=0)}: node {node} lost", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
