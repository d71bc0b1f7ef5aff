"""The command line: `anymal VERB ...`, the same as `python -m megatron_anymal VERB ...`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from megatron_anymal import __version__
from megatron_anymal.quiet import quiet_libraries

# Verb -> module and its function that takes the arguments, does the work and returns the exit code; a line of help.
VERBS = {
    "pretrain": ("nemo.entry:pretrain", "align modalities to a Llama: --config-name=NAME [key=value ...]"),
    "sft": ("nemo.entry:sft", "instruction tuning: --config-name=NAME [key=value ...]"),
    "dpo": ("nemo.entry:dpo", "learning from preferences: --config-name=NAME [key=value ...]"),
    "generate": ("generate:main", "answer prompts with media, from a checkpoint"),
    "evaluate": ("evaluate:main", "score a checkpoint on prepared data"),
    "prepare": ("data.prepare:main", "make shards and their index"),
    "inspect": ("data.inspect:main", "check shards; show samples as the model sees them"),
    "doctor": ("doctor:main", "what is installed, what is missing, what mends it"),
}
# Mistakes of the user: reported in one line, without a traceback.
USER_ERRORS = (
    ("megatron_anymal.config", "ConfigError"),
    ("megatron_anymal.data.types", "DataError"),
    ("megatron_anymal.modalities.base", "MediaError"),
    ("megatron_anymal.checkpoint.store", "CheckpointError"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the process's exit code (2: a mistake of the user)."""
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
    try:
        module, _, function = VERBS[verb][0].partition(":")
        return getattr(importlib.import_module(f"megatron_anymal.{module}"), function)(rest)
    except ValueError as error:
        if not _is_users(error):
            raise
        return _fail(str(error))


def _is_users(error: ValueError) -> bool:
    # A module not loaded cannot have raised: nothing is imported to find out.
    classes = [getattr(sys.modules.get(module), name, None) for module, name in USER_ERRORS]
    return isinstance(error, tuple(c for c in classes if c is not None))


def _fail(message: str) -> int:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    where = f" (rank {os.environ.get('RANK', '?')})" if several else ""
    print(f"error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


def _usage() -> str:
    width = max(len(verb) for verb in VERBS)
    lines = [f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items()]
    return "\n".join(["usage: anymal VERB ...    (anymal VERB --help)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
