"""The option --integrity of the verbs that answer prompts."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Optional

from megatron_anymal.cli.model_arguments import load_generator

if TYPE_CHECKING:
    from megatron_anymal.generation.generator import Generator
    from megatron_anymal.integrity.config import IntegrityConfig


def add_integrity_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--integrity", metavar="FILE", help="reject queries by the classifiers that this .yaml file names"
    )


def integrity_of(arguments: argparse.Namespace) -> Optional[IntegrityConfig]:
    """Read the integrity file, before anything slow is imported; None without the option.

    Raises:
        ConfigError: the file, or the folder of a classifier, cannot be used.
    """
    if not arguments.integrity:
        return None
    from megatron_anymal.integrity.config import read_integrity

    return read_integrity(arguments.integrity)


def load_checked_generator(
    arguments: argparse.Namespace,
    integrity: Optional[IntegrityConfig],
    *,
    untrained: bool = False,
    replicated: bool = False,
) -> Generator:
    """Load the model of `--checkpoint`, and the classifiers that check its queries.

    Args:
        integrity: None: nothing is checked.
        untrained: keep the projectors' initial values.
        replicated: let processes beyond the parallel sizes hold further copies of the model.

    Raises:
        CheckpointError, ConfigError: as `load_generator`, or a classifier cannot be loaded.
    """
    generator = load_generator(arguments, untrained=untrained, replicated=replicated)
    if integrity is None:
        return generator
    from megatron_anymal.integrity.checked_generator import CheckedGenerator

    return CheckedGenerator(generator, integrity)


def report_overhead(generator: Generator, integrity: Optional[IntegrityConfig]) -> None:
    """Print what the checks rejected and the time that they took; nothing without the option."""
    if integrity is None or not generator.leads_replica:
        return
    from megatron_anymal.integrity.checked_generator import CheckedGenerator

    assert isinstance(generator, CheckedGenerator)
    print(generator.summary(), file=sys.stderr, flush=True)
