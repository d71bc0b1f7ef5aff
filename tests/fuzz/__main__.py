"""`make fuzz`: read mutated shards, media, manifests, weights and checkpoints, and print a table of outcomes."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tiny import make_shards, make_tokenizer

from fuzz import corpus
from fuzz.workers import HANG_SECONDS, MEMORY_BYTES, Result, run_cases
from megatron_anymal.telemetry import Progress

OUTCOMES = ("read", "named", "refused", "silent", "traceback", "hang", "memory", "died")


def table(results: Iterable[Result]) -> str:
    """Return a Markdown table of outcomes per kind of mutated file."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        target = result.label.partition(",")[0]
        if target.startswith(("checkpoint", "shard")):
            target = target.partition(" ")[0]
        counts.setdefault(target, Counter())[result.kind] += 1
    rows = [f"| mutated file | cases | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 2) + "|"]
    total: Counter[str] = sum(counts.values(), Counter())
    for target, outcomes in [*sorted(counts.items()), ("all", total)]:
        numbers = " | ".join(str(outcomes[kind]) for kind in OUTCOMES)
        rows.append(f"| {target} | {sum(outcomes.values())} | {numbers} |")
    return "\n".join(rows)


def main() -> int:
    """Run the cases. Return 1 if any failed."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="total number of mutated files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="cases are split evenly")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--one", type=int, nargs=2, metavar=("SEED", "NUMBER"), help="rerun only this case")
    parser.add_argument("--out", help="write the table to this Markdown file")
    arguments = parser.parse_args()
    per_seed = -(-arguments.cases // len(arguments.seeds))
    jobs = [(seed, number) for seed in arguments.seeds for number in range(per_seed)][: arguments.cases]
    if arguments.one:
        jobs = [tuple(arguments.one)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = make_tokenizer(folder / "tokenizer")
        shards = make_shards(folder / "data", tokenizer, 16)
        checkpoint = corpus.checkpoint(folder, tokenizer, shards)
        progress, results = Progress("mutations", len(jobs)), []
        for result in run_cases(jobs, folder, tokenizer, checkpoint, arguments.workers):
            results.append(result)
            progress.advance()
            if result.failed or arguments.one:
                print(f"seed {result.seed}, number {result.number}: {result.label}: {result.outcome}", flush=True)
        progress.finish()
    shown = table(results)
    print(f"{shown}\n\nhang: over {HANG_SECONDS:g} s; memory: grew by over {MEMORY_BYTES >> 20} MiB")
    if arguments.out:
        Path(arguments.out).write_text(shown + "\n")
    return 1 if any(result.failed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
