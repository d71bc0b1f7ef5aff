"""`anymal synthesize`: conversations about media, written by a language model from captions, objects and boxes.

The server is any that has OpenAI's chat completions, such as vLLM or `transformers serve`. Each result is saved
before the next one; run the same command again to continue. The output is a manifest for `anymal prepare`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_anymal.config import ConfigError
from megatron_anymal.data.records import DataError

if TYPE_CHECKING:
    from megatron_anymal.synthesis.run import SynthesisResult


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code: 1 if the server did not answer some samples."""
    arguments = _parser().parse_args(argv)
    if arguments.list_tasks:
        return _list_tasks()
    _check(arguments)
    from megatron_anymal.data.journal import Journal
    from megatron_anymal.synthesis.client import Endpoint
    from megatron_anymal.synthesis.run import Synthesis
    from megatron_anymal.synthesis.sources import read_sources
    from megatron_anymal.synthesis.tasks import find_task

    endpoint = Endpoint(
        arguments.server,
        arguments.model,
        os.environ.get(arguments.api_key_env) or None,
        arguments.timeout,
        arguments.retries,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
    )
    task, sources, out = find_task(arguments.task), read_sources(arguments.manifest), Path(arguments.out)
    synthesis = Synthesis(sources, task, endpoint, arguments.concurrency, arguments.attempts)
    journal = Journal(out.with_suffix(".journal.jsonl"))
    try:
        synthesis.run(journal)
    except KeyboardInterrupt:
        print("\nstopped; start the same command again to continue")
        return 130
    finally:
        journal.close()
    result = synthesis.result(Path(arguments.manifest).absolute().parent, out.absolute().parent)
    return _finish(result, len(sources), out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymal synthesize", description=__doc__)
    parser.add_argument("--manifest", help=".jsonl manifest of media with captions, `objects` or `boxes`")
    parser.add_argument("--server", help="address of the server, such as http://localhost:8000")
    parser.add_argument("--model", help="name of the model on the server")
    parser.add_argument("--task", help="kind of conversation: a name that --list-tasks shows, or a .yaml file")
    parser.add_argument("--out", help=".jsonl manifest to write; its journal lies next to it")
    parser.add_argument("--list-tasks", action="store_true", help="show the kinds of conversations and exit")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    parser.add_argument(
        "--attempts", type=int, default=2, help="maximum number of answers to request until one is well-formed"
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one request")
    parser.add_argument("--retries", type=int, default=6, help="retries of a request that fails")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=1024, help="maximum number of tokens in an answer")
    parser.add_argument(
        "--api-key-env", metavar="NAME", default="OPENAI_API_KEY", help="environment variable that holds the API key"
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name in ("manifest", "server", "model", "task", "out"):
        if not getattr(arguments, name):
            raise ConfigError(f"--{name} is missing. Give --manifest, --server, --model, --task and --out.")
    if arguments.concurrency < 1 or arguments.attempts < 1:
        raise ConfigError("--concurrency and --attempts must be at least 1.")
    out = Path(arguments.out)
    if out.suffix != ".jsonl" or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out!r} must be a .jsonl file in a folder that exists.")
    if out.resolve() == Path(arguments.manifest).resolve():
        raise ConfigError("--out is the manifest itself. Name another file.")


def _list_tasks() -> int:
    from megatron_anymal.synthesis.tasks import shipped_tasks

    for name, task in shipped_tasks().items():
        print(f"{name:14s}{task.about}")
    return 0


def _finish(result: SynthesisResult, samples: int, out: Path) -> int:
    """Write the manifest and the list of samples without a conversation, and print the counts."""
    dropped = out.with_suffix(".dropped.jsonl")
    reasons = {**result.dropped, **result.failed}
    _write(dropped, ({"key": key, "reason": reason} for key, reason in reasons.items()))
    print(f"{samples} sample(s): {len(result.lines)} conversation(s), {len(result.dropped)} dropped, ", end="")
    print(f"{len(result.failed)} not answered; {result.prompt_tokens} + {result.completion_tokens} tokens")
    for reason, count in result.reasons.most_common():
        print(f"  {count} {reason}")
    if not result.lines:
        raise DataError(f"No sample has a usable conversation; {str(dropped)!r} has the reasons.")
    _write(out, result.lines)
    print(f"wrote {out}, {dropped}")
    return 1 if result.failed else 0


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
