"""The command line: `anymal VERB ...`, the same as `python -m megatron_anymal VERB ...`."""

from __future__ import annotations

import difflib
import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from megatron_anymal import __version__, lean_imports
from megatron_anymal.log_filters import quiet_libraries
from megatron_anymal.resilience.exit_codes import Exit, code_of, is_users
from megatron_anymal.resilience.failure_record import exit_after_cleanup, exit_now
from megatron_anymal.resilience.survival import may_stay

# Verb -> "module:function", which takes the arguments, does the work and returns the exit code; and its help text.
VERBS = {
    "pretrain": ("nemo.entry:pretrain", "align modalities to a Llama: --config-name=NAME [key=value ...]"),
    "sft": ("nemo.entry:sft", "instruction tuning: --config-name=NAME [key=value ...]"),
    "dpo": ("nemo.entry:dpo", "preference training: --config-name=NAME [key=value ...]"),
    "launch": (
        "launcher.command:main",
        "run a training verb in several processes, monitored and restarted: launch VERB ...",
    ),
    "generate": ("cli.generate:main", "answer prompts with media, from a checkpoint or an export"),
    "evaluate": ("cli.evaluate:main", "score a checkpoint or an export on benchmarks or prepared data"),
    "serve": ("cli.serve:main", "answer requests over HTTP: an OpenAI-compatible server with a chat page"),
    "compare": ("cli.compare:main", "let people judge the answers of two models"),
    "prepare": ("cli.prepare:main", "build shards and their index"),
    "synthesize": ("cli.synthesize:main", "turn captions and boxes into conversations, by a served language model"),
    "inspect": ("cli.inspect:main", "check shards; show samples as the model sees them"),
    "plan": ("cli.plan:main", "predict, before a run: layout, time, memory; plan goodput: failures, save interval"),
    "encode": ("cli.encode:main", "fill the feature cache of a run before it trains: --config-name=NAME"),
    "doctor": ("cli.doctor:main", "show what is installed, what is missing and how to fix it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code (resilience/exit_codes.py)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"megatron-anymal {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(VERBS)}."
        return _fail(f"unknown verb {verb!r}. {hint}")
    quiet_libraries()
    lean_imports.install()
    try:
        module, _, function = VERBS[verb][0].partition(":")
        return getattr(importlib.import_module(f"megatron_anymal.{module}"), function)(rest)
    except ValueError as error:
        if not is_users(error):
            raise
        return _fail(str(error), code_of(error))


def command() -> NoReturn:
    """Run `main` and exit with its code; after a failure, exit at once without waiting for other ranks or threads."""
    # A library that crashes in native code leaves the Python stack on standard error.
    faulthandler.enable(2)
    while True:
        try:
            code = main()
            break
        except SystemExit:
            # argparse has already printed the error or the help.
            raise
        except BaseException as error:
            traceback.print_exc()
            if _again(error):
                continue
            # 130 is the code that shells report for Ctrl-C.
            code = 130 if isinstance(error, KeyboardInterrupt) else code_of(error)
            break
    if code:
        exit_now(code)
    exit_after_cleanup(0)


def _again(error: BaseException) -> bool:
    """Whether to run the program again: a rank that takes part in the next attempt of `anymal launch`."""
    if not may_stay():
        return False
    from megatron_anymal.launcher.rejoining import rejoin

    return rejoin(error)


def _fail(message: str, code: int = Exit.MISTAKE) -> int:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    where = f" (rank {os.environ.get('RANK', '?')})" if several else ""
    print(f"error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return int(code)


def _usage() -> str:
    width = max(len(verb) for verb in VERBS)
    lines = [f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items()]
    return "\n".join(["usage: anymal VERB ...    (anymal VERB --help)", "", *lines])


if __name__ == "__main__":
    command()
