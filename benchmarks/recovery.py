"""Measure how much time a killed rank costs a run, phase by phase, with one process and with several.

    PYTHONPATH=.:tests:tests/faults python benchmarks/recovery.py --out results.json

Jobs of a tiny AnyMAL under `anymal launch`, one after the other; each loses ranks to SIGKILL. A job of several
processes runs twice: the ranks that survive keep their process and their frozen weights, or all are forked anew
(`resilience.keep_survivors`). `--base-gb` gives it a frozen Llama of that size, which surviving ranks do not reread.
The floor is the job of one process: it neither waits for other ranks nor shares its cores with them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import yaml
from launched import launch, rank_processes, wait_for_step, write_config
from measuring import surroundings
from test_sigkill import kill, steps_of
from tiny import LLAMA, make_shards, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_anymal.launcher.recoveries import Recovery, recoveries
from megatron_anymal.resilience.events import read

# Steps after which a job has certainly finished starting up.
_STEPS = 5
# Shape of the Llama of --base-gb, without its number of layers; parameters of a layer and bytes of each.
_SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
_PER_LAYER, _BYTES = 1024 * 1024 * 5 // 2 + 3 * 1024 * 2816, 4
_PHASES = ("ending", "pause", "joining", "restoring", "first_step", "total")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="ranks of each job; 1 is the floor")
    parser.add_argument("--kills", type=int, default=10, help="ranks killed in each job")
    parser.add_argument("--base-gb", type=float, default=0.0, help="size of a frozen Llama in fp32; 0: a tiny one")
    parser.add_argument("--seed", type=int, default=0, help="seed that decides which ranks are killed")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(arguments)
    if min(*options.processes, options.kills, 1) < 1:
        parser.error("--processes and --kills must be at least 1.")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {str(options.out.absolute().parent)!r}.")
    around, chance = surroundings(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="anymal_recovery_") as scratch:
        folder = Path(scratch)
        tokenizer = make_tokenizer(folder / "tokenizer")
        train = make_shards(folder / "mixed", tokenizer, 40, ("image", "audio", "imu", "text", "mixed"))
        write_config(folder, train, make_shards(folder / "text", tokenizer, 24, ("text",)), tokenizer, 1_000_000, 1000)
        if options.base_gb:
            _use_llama(folder, max(1, round(options.base_gb * 1e9 / _BYTES / _PER_LAYER)))
        jobs = [
            (number, keep) for number in dict.fromkeys(options.processes) for keep in (True, False)[: 1 + (number > 1)]
        ]
        rows = {(number, keep): _job(folder, number, keep, options.kills, chance) for number, keep in jobs}
    _print(rows)
    if options.out:
        command = " ".join(["python benchmarks/recovery.py", *(sys.argv[1:] if arguments is None else arguments)])
        jobs_of = [
            {
                "processes": number,
                "keep_survivors": keep,
                "recoveries": [{**asdict(row), "total": row.total} for row in of_job],
            }
            for (number, keep), of_job in rows.items()
        ]
        options.out.write_text(json.dumps({"command": command, **around, "jobs": jobs_of}, indent=1) + "\n")
    return 0


def _use_llama(folder: Path, layers: int) -> None:
    """Write a Llama with random weights, and have the configuration in the same folder use it."""
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, **_SHAPE, "num_hidden_layers": layers})).save_pretrained(folder / "llama")
    values = yaml.safe_load((folder / "tiny.yaml").read_text())
    values["model"]["language_model"] |= {"path": str(folder / "llama"), "config": {}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))


def _job(folder: Path, processes: int, keep: bool, kills: int, chance: random.Random) -> list[Recovery]:
    """Train with this many processes and repeatedly kill one of them; return the recoveries."""
    run = folder / f"run_{processes}_{keep}"
    settings = ("model.optim.sched.name=constant", f"resilience.keep_survivors={str(keep).lower()}")
    job = launch(folder, run, processes, *settings, log=folder / "log")
    try:
        for number in range(kills):
            wait_for_step(run, max(steps_of(run), default=0) + _STEPS, job)
            os.kill(chance.choice(sorted(rank_processes(job.pid).values())), signal.SIGKILL)
            while len(_finished(run)) == number:
                if job.poll() is not None:
                    raise RuntimeError(f"the launcher ended:\n{(folder / 'log').read_text()[-4000:]}")
                time.sleep(0.1)
    finally:
        kill(job)
    return _finished(run)


def _finished(run: Path) -> list[Recovery]:
    """Recoveries after which a step has ended."""
    return [recovery for recovery in recoveries(read(run)) if recovery.total is not None]


def _print(rows: dict[tuple[int, bool], list[Recovery]]) -> None:
    print("medians in seconds, from the first sign of the failure to the end of the next step; the floor: 1 process\n")
    head = f"{'processes':>9} {'survivors':>12} {'recoveries':>10} {'stayed':>6}"
    print(head + "".join(f"{phase.replace('_', ' '):>12}" for phase in _PHASES))
    for (number, keep), of_job in rows.items():
        medians = [_median(getattr(recovery, phase) for recovery in of_job) for phase in _PHASES]
        survivors = "none" if number == 1 else "stay" if keep else "forked anew"
        stayed = sum(recovery.stayed for recovery in of_job)
        print(f"{number:>9} {survivors:>12} {len(of_job):>10} {stayed:>6}" + "".join(f"{s:>12.2f}" for s in medians))


def _median(values: Any) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else float("nan")


if __name__ == "__main__":
    sys.exit(main())
