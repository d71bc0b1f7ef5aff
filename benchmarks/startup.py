"""Measure how long commands take to start: processor time (user and system) and wall time of whole processes.

    python benchmarks/startup.py --out results.json
    python benchmarks/startup.py --against OTHER_CHECKOUT      in turns with another version's code

The floor is `import torch`. The ranks are those of tiny models on one CPU, from exec to the end of their first step
with a checkpoint; the last row starts two of them with `anymal launch`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import surroundings
from PIL import Image

ROOT = Path(__file__).parents[1]
_COLOURS = ("red", "green", "blue", "white")


@dataclass(frozen=True)
class Command:
    """A command line to time."""

    # Arguments of Python.
    words: list[str]
    # Exit code that is expected.
    code: int = 0
    # Whether it needs models and data.
    prepared: bool = False


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, whose code takes turns with this one's")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each row (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], help="row to measure; may be repeated (default: all)")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    trees = {"this": ROOT, **({"other": options.against.resolve()} if options.against else {})}
    with tempfile.TemporaryDirectory(prefix="anymal_startup_") as scratch:
        folder = Path(scratch)
        rows = {name: row for name, row in _commands().items() if not options.only or name in options.only}
        if any(row.prepared for row in rows.values()):
            _prepare(folder)
        measured = {name: _turns(row, trees, folder, options.rounds) for name, row in rows.items()}
    result = {**surroundings(), "command": " ".join(sys.argv), "rounds": options.rounds, "rows": measured}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in measured.items():
        shown = ", ".join(f"{side} {times['cpu']:.2f} s ({times['wall']:.2f} s)" for side, times in row.items())
        ratio = f"  ratio {row['this']['cpu'] / row['other']['cpu']:.2f}" if "other" in row else ""
        print(f"{name:28s} processor time (wall): {shown}{ratio}")
    return 0


def _prepare(folder: Path) -> None:
    """Write pictures, tiny models and prepared data, as docs/start/your-own-data.md does."""
    for split, count in (("train", 32), ("held_out", 8)):
        lines = []
        for number in range(count):
            colour = _COLOURS[number % len(_COLOURS)]
            path = folder / f"{split}_{number}.png"
            Image.fromarray(np.full((64, 64, 3), 40 * number % 255, np.uint8)).save(path)
            lines.append(json.dumps({"key": path.stem, "media": path.name, "text": f" a {colour} picture"}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    models = ["-m", "examples.tiny_models", "--manifest", "train.jsonl", "--out", "checkpoints"]
    commands = [models]
    for split, out in (("train", "image_text"), ("held_out", "image_text_held_out")):
        tokenizer = ["--tokenizer", "checkpoints/Llama-3.2-1B", "--workers", "1"]
        commands.append(
            ["-m", "megatron_anymal", "prepare", "--manifest", f"{split}.jsonl", "--out", f"data/{out}", *tokenizer]
        )
    (folder / "configs").mkdir()
    shutil.copy(ROOT / "nemo_configs" / "pretrain_1b_image.yaml", folder / "configs" / "tiny.yaml")
    commands.append(_rank("first"))
    commands.append(["-m", "checkpoint_tools.export_hf", "--checkpoint", "first", "--out", "exported", "--no-verify"])
    for words in commands:
        _run(words, ROOT, folder)


def _rank(run: str, *more: str, verb: Sequence[str] = ("pretrain",)) -> list[str]:
    """One step of a run of the tiny models, with a checkpoint."""
    settings = {
        "exp_manager.explicit_log_dir": run,
        "trainer.precision": "32",
        "trainer.max_steps": "1",
        "trainer.val_check_interval": "0",
        "trainer.log_every_n_steps": "1",
        "trainer.sampled_answers": "0",
        "model.global_batch_size": "4",
        "model.optim.sched.warmup_steps": "0",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()] + ["~data.validation.image_text", *more]
    return ["-m", "megatron_anymal", *verb, "--config-path=configs", "--config-name=tiny", *overrides]


def _commands() -> dict[str, Command]:
    anymal = ["-m", "megatron_anymal"]
    inspect = [*anymal, "inspect", "data/image_text", "--tokenizer=checkpoints/Llama-3.2-1B"]
    prompt = ["--media=train_0.png", "--text= a", "--max-new-tokens=4"]
    two = _rank("two", "trainer.devices=2", verb=("launch", "--nproc-per-node=2", "pretrain"))
    return {
        "import torch": Command(["-c", "import torch"]),
        **{f"{verb} --help": Command([*anymal, verb, "--help"]) for verb in ("generate", "prepare", "inspect")},
        "a wrong checkpoint": Command([*anymal, "generate", "--checkpoint=nowhere", "--text=hi"], code=2),
        "doctor": Command([*anymal, "doctor"]),
        "inspect data": Command(inspect, prepared=True),
        "inspect a checkpoint": Command(["-m", "checkpoint_tools.inspect", "first"], prepared=True),
        "generate with an export": Command([*anymal, "generate", "--checkpoint=exported", *prompt], prepared=True),
        "dry run": Command([*_rank("dry"), "--dry-run"], prepared=True),
        "a rank to its first step": Command(_rank("one"), prepared=True),
        "two launched ranks": Command(two, prepared=True),
    }


def _turns(command: Command, trees: dict[str, Path], folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in trees}
    for number in range(rounds):
        for side in list(trees)[:: 1 if number % 2 == 0 else -1]:
            for run in ("one", "two", "dry"):
                shutil.rmtree(folder / run, ignore_errors=True)
            times[side].append(_run(command.words, trees[side], folder, command.code))
    return {
        side: {
            "cpu": statistics.median(cpu for cpu, _ in all_times),
            "wall": statistics.median(wall for _, wall in all_times),
            "rounds": all_times,
        }
        for side, all_times in times.items()
    }


def _run(words: list[str], tree: Path, folder: Path, code: int = 0) -> tuple[float, float]:
    """Processor seconds, with those of child processes, and wall seconds of a process with a checkout's code."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise SystemExit(
            f"{' '.join(words)} with {tree} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


if __name__ == "__main__":
    sys.exit(main())
