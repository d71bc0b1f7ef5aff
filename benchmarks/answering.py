"""Compare the evaluation of prepared samples with media read ahead by other processes, and with media read in between.

    python benchmarks/answering.py --checkpoint RUN --data FOLDER [--data FOLDER] --out results.json

Both sides answer the same samples with the same model, and take turns; their answers must be the same. The floor is the
longer of reading, shared by the processes, and of everything else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import ratio, surroundings, take_turns, timed

from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.evaluation import read_questions
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.read_ahead import reading_processes
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.parallel import shutdown


def compare(generator: NativeGenerator, prompts: Sequence[Prompt], batch_size: int, rounds: int) -> dict[str, Any]:
    """Answer the prompts both ways in turns; wall-clock seconds.

    Raises:
        ValueError: the answers differ.
    """
    sampling, processes = Sampling(max_new_tokens=20), max(1, reading_processes())
    generator.read_in_processes(processes)
    answers: dict[str, list[str]] = {}
    reading: list[float] = []
    taken = timed(generator._ahead, "take")

    def between(number: int) -> None:
        taken.clear()
        starts = range(0, len(prompts), batch_size)
        batches = [(prompts[start : start + batch_size], range(start, start + batch_size)) for start in starts]
        answers["between"] = [reply.text for batch in batches for reply in generator.answer_batch(*batch, sampling)]
        reading.append(sum(taken))

    def ahead(number: int) -> None:
        answers["ahead"] = generator.answer(prompts, sampling, batch_size)

    turns = take_turns({"between": between, "ahead": ahead}, rounds, warm_up=1)
    if answers["between"] != answers["ahead"]:
        raise ValueError("the answers differ")
    read = statistics.median(reading[1:])
    seconds = {name: statistics.median(turn.wall) for name, turn in turns.items()}
    return {
        "samples": len(prompts),
        "processes_that_read": processes,
        "seconds": seconds,
        "reading": read,
        "floor": max(read / processes, seconds["between"] - read),
        "wall": asdict(ratio(turns["between"].wall, turns["ahead"].wall)),
    }


def report(results: dict[str, Any]) -> str:
    """Format the results as text."""
    seconds, wall = results["seconds"], results["wall"]
    return "\n".join(
        [
            f"{results['date']}; {results['machine']}; {results['threads']} threads; "
            f"load before: {results['load']:.1f}",
            f"{results['samples']} samples, the same answers; {results['processes_that_read']} processes read",
            f"read in between: {seconds['between']:.2f} s, of which reading {results['reading']:.2f} s",
            f"read ahead:      {seconds['ahead']:.2f} s; the floor is {results['floor']:.2f} s",
            f"samples per second, ahead over between: {wall['median']:.2f} "
            f"({wall['lower']:.2f} to {wall['upper']:.2f})",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run of the trainer, or one of its checkpoints")
    parser.add_argument("--data", action="append", required=True, help="prepared folder; may be repeated")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts per batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, at least 2 (default: %(default)s)")
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, to compute quartiles.")
    about = {"command": " ".join(["python benchmarks/answering.py", *argv]), **surroundings()}
    prompts = [question.prompt for folder in arguments.data for question in read_questions(folder)]
    generator = NativeGenerator.of_run(arguments.checkpoint)
    results = {**about, **compare(generator, prompts, arguments.batch_size, arguments.rounds)}
    shutdown()
    print(report(results))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
