"""`anymal encode`: fill the feature cache of a run before it trains."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_anymal.config import ConfigError

_DESCRIPTION = """Encode the media of all data sets of a run, and store the features in data.feature_cache.

Pieces that are already in the cache are skipped, so an interrupted command can simply be run again. Encodes on this
machine's GPUs, or on its CPU if it has none: a run on GPUs does not use features computed on a CPU, nor vice versa."""


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.processes < 1:
        raise ConfigError(f"--processes={arguments.processes} must be 1 or more.")
    from megatron_anymal.config.compose import compose, config_folder
    from megatron_anymal.config.validation import check

    folder = config_folder(arguments.config_path)
    config = compose(arguments.config_name, folder, arguments.overrides).config
    check(config)
    if not config.data.feature_cache.gib:
        raise ConfigError("data.feature_cache.gib is 0, so there is no cache to fill. Set it above 0.")
    from megatron_anymal.train.encode_ahead import fill

    filled = fill(config, arguments.processes, lambda text: print(text, file=sys.stderr, flush=True))
    for line in filled.bad[:10]:
        print(f"warning: {line}", file=sys.stderr)
    print(f"{filled.encoded} pieces encoded, {filled.present} already cached, {len(filled.bad)} samples cannot be read")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anymal encode",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="anymal encode --config-name NAME [options] [key=value ...]",
    )
    parser.add_argument("--config-name", required=True, metavar="NAME", help="the run's configuration")
    parser.add_argument(
        "--config-path", metavar="FOLDER", help="configuration folder; default: the shipped nemo_configs"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="NUMBER", help="processes that decode and encode (default: 1)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    return parser
