"""`anymal evaluate`: accuracy of exact answers on prepared samples.

The last text of a sample, or the last turn of a conversation, is the expected answer; the model gets everything before
it and answers, greedily by default.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.cli.model_arguments import (
    add_model_arguments,
    add_sampling_arguments,
    check_model,
    load_generator,
    sampling_of,
)


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    parser = argparse.ArgumentParser(prog="anymal evaluate", description=__doc__)
    parser.add_argument("--data", action="append", required=True, help="a prepared folder; may be repeated")
    parser.add_argument("--limit", type=int, help="number of samples per folder; default: all")
    parser.add_argument("--permute-media", action="store_true", help="also score with media swapped between samples")
    parser.add_argument("--untrained", action="store_true", help="also score with the projectors' initial values")
    parser.add_argument("--out", help="write scores and answers to this .json file")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    arguments = parser.parse_args(argv)
    sampling = sampling_of(arguments)
    from megatron_anymal.generation.evaluation import evaluate, permute_media, read_questions

    questions = [question for folder in arguments.data for question in read_questions(folder, arguments.limit)]
    check_model(arguments, untrained=arguments.untrained)
    runs = {"trained": (load_generator(arguments), questions)}
    if arguments.permute_media:
        runs["permuted"] = (runs["trained"][0], permute_media(questions))
    if arguments.untrained:
        runs["untrained"] = (load_generator(arguments, untrained=True), questions)
    result: dict[str, Any] = {"scores": {}, "answers": {}}
    for name, (generator, asked) in runs.items():
        scores, rows = evaluate(generator, asked, sampling, arguments.batch_size)
        result["answers"][name] = rows
        result["scores"][name] = {
            modality: {"accuracy": s.accuracy, "chance": s.chance, "samples": s.samples}
            for modality, s in scores.items()
        }
        if generator.reports:
            for modality, s in scores.items():
                print(f"{name:10s} {modality:8s} {s.accuracy:7.1%} of {s.samples} exact (guessing: {s.chance:.1%})")
    if arguments.out and runs["trained"][0].reports:
        Path(arguments.out).write_text(json.dumps(result, indent=1, ensure_ascii=False))
    return 0
