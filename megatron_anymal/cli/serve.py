"""`anymal serve`: an OpenAI-compatible server and a chat page for a checkpoint or an exported folder.

Requests are answered together: each joins the running batch between two tokens and leaves it when it is done. SIGTERM
and Ctrl-C let the running requests finish.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_anymal.cli.integrity_arguments import add_integrity_argument, integrity_of, load_checks
from megatron_anymal.cli.model_arguments import add_loading_arguments, check_model, load_generator
from megatron_anymal.config import ConfigError
from megatron_anymal.serving.limits import ServingLimits

_HOST, _PORT = "127.0.0.1", 8000


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    arguments = _parser().parse_args(argv)
    limits = _limits(arguments)
    _check(arguments)
    check_model(arguments)
    integrity = integrity_of(arguments)
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"`anymal serve` needs {missing[0]}, which is missing: pip install 'megatron-anymal[serve]'.")
    from megatron_anymal.integrity.checks import overhead
    from megatron_anymal.serving.server import GracefulServer, listen
    from megatron_anymal.serving.service import Service

    # Before the model is loaded: the port may be in use.
    opened = listen(arguments.host, arguments.port, limits.client_timeout)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    name = arguments.model_name or Path(arguments.checkpoint).resolve().name
    generator = load_generator(arguments)
    checks = load_checks(generator, integrity)
    service = Service(generator, name, limits, checks)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{host}:{opened.getsockname()[1]}"

    def ready() -> None:
        print(f"serving {name!r} at {address}/v1, chat page at {address}/ (Ctrl-C ends)", flush=True)

    began = time.perf_counter()
    try:
        GracefulServer(service, arguments.shutdown_seconds, ready).run(sockets=[opened])
    finally:
        service.close()
        if checks:
            print(overhead(checks, time.perf_counter() - began), file=sys.stderr, flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymal serve", description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="FOLDER", help="folder of an export, of a training checkpoint, or of a run"
    )
    parser.add_argument("--host", default=_HOST, help=f"address to listen on; default: {_HOST}, this machine only")
    parser.add_argument("--port", type=int, default=_PORT, help=f"port to listen on; default: {_PORT}; 0: a free one")
    parser.add_argument("--model-name", default="", help="name of the model in requests; default: the folder's name")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-batch", type=int, default=64, help="maximum number of answers computed together; default: 64"
    )
    limits.add_argument(
        "--max-queue",
        type=int,
        default=64,
        help="maximum number of waiting requests; further ones get 429; default: 64",
    )
    limits.add_argument(
        "--max-new-tokens", type=int, default=512, help="maximum number of tokens in an answer; default: 512"
    )
    limits.add_argument(
        "--max-cache-tokens",
        type=int,
        default=131_072,
        help="maximum number of tokens in the key-value cache: answers in the batch times the longest; default: 131072",
    )
    limits.add_argument("--max-body-mb", type=float, default=32.0, help="largest request in MiB; default: 32")
    limits.add_argument(
        "--client-timeout",
        type=float,
        default=30.0,
        help="seconds for which a client may neither send nor read anything; default: 30",
    )
    limits.add_argument(
        "--shutdown-seconds",
        type=float,
        default=30.0,
        help="seconds that running requests get to finish after SIGTERM; default: 30",
    )
    add_integrity_argument(parser)
    add_loading_arguments(parser)
    # Prompts are read as their requests come.
    parser.set_defaults(workers=0)
    return parser


def _limits(arguments: argparse.Namespace) -> ServingLimits:
    return ServingLimits(
        max_body_bytes=int(arguments.max_body_mb * 2**20),
        max_queue=arguments.max_queue,
        max_batch=arguments.max_batch,
        max_new_tokens=arguments.max_new_tokens,
        max_cache_tokens=arguments.max_cache_tokens,
        client_timeout=arguments.client_timeout,
    )


def _check(arguments: argparse.Namespace) -> None:
    """Check what needs neither a model nor the server's libraries."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "`anymal serve` runs in one process, with the model on one device. Start it without torchrun."
        )
    if arguments.shutdown_seconds < 0:
        raise ConfigError(f"--shutdown-seconds={arguments.shutdown_seconds:g} must be 0 or above.")
