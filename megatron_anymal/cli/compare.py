"""`anymal compare`: people judge the answers of two models, without knowing whose they are.

A and B are checkpoints or exported folders, which answer the prompts first, or .jsonl files of answers as
`anymal generate --out` writes them. The page that opens at the printed address asks which answer is better, and for the
scores of three rubrics. Each judgement is saved before the next one; run the same command again to continue.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_anymal.cli.model_arguments import (
    add_loading_arguments,
    add_sampling_arguments,
    check_model,
    load_generator,
    sampling_of,
)
from megatron_anymal.config import ConfigError
from megatron_anymal.data.records import DataError

if TYPE_CHECKING:
    from megatron_anymal.generation.sampling import Sampling
    from megatron_anymal.judgement.items import JudgedItem, ReadablePrompt

# Files of a comparison's folder.
_JUDGEMENTS, _SETTINGS, _ITEMS = "judgements.jsonl", "comparison.json", "items.json"


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    arguments = _parser().parse_args(argv)
    from megatron_anymal.judgement.comparison import keep_settings
    from megatron_anymal.judgement.items import JudgedItem, read_answers, read_questions

    sampling, questions = sampling_of(arguments), read_questions(arguments.prompts)
    sources = {"a": arguments.a, "b": arguments.b}
    models = [side for side, source in sources.items() if not source.endswith(".jsonl")]
    _check(arguments, models)
    given = {side: read_answers(sources[side], questions) for side in sources if side not in models}
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**sources, "seed": arguments.order_seed, "sampling": asdict(sampling) if models else None}
    # As JSON has it: lists for tuples.
    keep_settings(folder / _SETTINGS, json.loads(json.dumps(settings)))
    for side in models:
        given[side] = _model_answers(_of_side(arguments, side), sampling, questions, folder / f"answers_{side}.jsonl")
    items = [JudgedItem(question, a, b) for question, a, b in zip(questions, given["a"], given["b"])]
    keep_settings(folder / _ITEMS, {item.question.key: item.fingerprint for item in items})
    if not arguments.report_only:
        _serve(arguments, items, folder / _JUDGEMENTS)
    _report(arguments, items, folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymal compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="a checkpoint, an exported folder, or a .jsonl file of answers")
    parser.add_argument("b", metavar="B", help="the other model, likewise")
    parser.add_argument("--prompts", required=True, help=".jsonl file: `parts` or `messages` on each line")
    parser.add_argument("--out", required=True, help="folder for judgements and results; an existing one is continued")
    parser.add_argument("--port", type=int, default=0, help="port of the page, on 127.0.0.1; default: a free one")
    parser.add_argument("--order-seed", type=int, default=0, help="seed that decides which answer is shown first")
    parser.add_argument("--report-only", action="store_true", help="write the results so far and do not serve the page")
    parser.add_argument("--export-pairs", metavar="FILE", help="write the choices as preference pairs, a manifest")
    add_loading_arguments(parser)
    add_sampling_arguments(parser)
    return parser


def _check(arguments: argparse.Namespace, models: Sequence[str]) -> None:
    """Check everything that needs no model, before one is loaded."""
    if arguments.a == arguments.b:
        raise ConfigError(f"A and B are both {arguments.a!r}. Name two models.")
    for side in models:
        check_model(_of_side(arguments, side))
    if models and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "`anymal compare` runs in one process. For a model that needs several, write its answers with "
            "`torchrun ... generate --prompts FILE --out ANSWERS.jsonl`, and name that file."
        )
    if Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise ConfigError(f"--out {arguments.out!r} is a file. Name a folder.")
    pairs = arguments.export_pairs
    if pairs and (Path(pairs).suffix != ".jsonl" or not Path(pairs).absolute().parent.is_dir()):
        raise ConfigError(f"--export-pairs {pairs!r} must be a .jsonl file in a folder that exists.")


def _of_side(arguments: argparse.Namespace, side: str) -> argparse.Namespace:
    """The arguments with which the other verbs load this side's model."""
    return argparse.Namespace(**{**vars(arguments), "checkpoint": getattr(arguments, side)})


def _model_answers(
    arguments: argparse.Namespace, sampling: Sampling, questions: Sequence[ReadablePrompt], path: Path
) -> list[str]:
    """A model's answers, from the folder if an earlier start has written them."""
    from megatron_anymal.judgement.items import read_answers

    if not path.is_file():
        from megatron_anymal.generation.prompts import read_prompts

        prompts = read_prompts(arguments.prompts)
        answers = load_generator(arguments).answer(prompts, sampling, arguments.batch_size)
        rows: list[dict[str, Any]] = [{"prompt": n, "answer": answer.strip()} for n, answer in enumerate(answers)]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.replace(path)
    return read_answers(str(path), questions)


def _serve(arguments: argparse.Namespace, items: Sequence[JudgedItem], path: Path) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    from megatron_anymal.data.journal import Journal
    from megatron_anymal.judgement.comparison import Comparison
    from megatron_anymal.judgement.server import JudgementServer

    journal = Journal(path)
    # As Ctrl-C, which a shell's background job ignores.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server = JudgementServer(Comparison(items, journal, arguments.order_seed), arguments.port)
        with server:
            print(f"{len(items)} item(s) to judge at {server.url} (Ctrl-C ends)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(flush=True)
    finally:
        journal.close()


def _report(arguments: argparse.Namespace, items: Sequence[JudgedItem], folder: Path) -> None:
    """Write the results and, if asked, the preference pairs."""
    from megatron_anymal.data.journal import read_journal
    from megatron_anymal.judgement.preferences import preference_pairs, write_pairs
    from megatron_anymal.judgement.report import summary, write_report
    from megatron_anymal.judgement.results import compute

    rows = read_journal(folder / _JUDGEMENTS)
    result = compute(rows, len(items), (arguments.a, arguments.b))
    paths = write_report(folder, result)
    print(f"{summary(result)}\nwrote {', '.join(map(str, paths))}")
    if arguments.export_pairs:
        path = Path(arguments.export_pairs)
        pairs, without = preference_pairs(items, rows, path.absolute().parent)
        if not pairs:
            raise DataError(f"--export-pairs {str(path)!r}: no item has a preference yet. Judge some first.")
        write_pairs(path, pairs)
        others = "".join(f", {count} without ({reason})" for reason, count in without.items())
        print(f"wrote {path}: {len(pairs)} pair(s){others}")
