"""`python -m checkpoint_tools.verify --checkpoint CHECKPOINT --export FOLDER`: compare an export with its checkpoint.

The trainer's own model and the exported folder, loaded by its own code in a process that cannot import the trainer,
run on the same samples of every modality and on one sample that combines all of them. Token ids and encoder inputs must
be identical, logits equal up to rounding. Both compute in fp32 on the weights as the run had them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_anymal import lean_imports
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.trust import FLAG, config_of
from megatron_anymal.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print the results; return the exit code (1: they differ, 2: they cannot be compared)."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_tools.verify", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or run folder for the newest one")
    parser.add_argument("--export", required=True, help="folder that checkpoint_tools.export_hf wrote for it")
    parser.add_argument("--data", action="append", default=[], help="prepared folder (repeatable); default: the run's")
    parser.add_argument("--samples", type=int, default=2, help="number of samples per modality")
    parser.add_argument(FLAG, action="store_true", help="run plug-ins named by the checkpoint")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the export's code even if it is unknown")
    arguments = parser.parse_args(argv)
    try:
        folder, export = store.resolve(arguments.checkpoint), Path(arguments.export)
        if not (export / "config.json").is_file():
            raise ConfigError(f"--export={str(export)!r} has no config.json. Pass a folder written by export_hf.")
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # These take seconds to import, so wrong paths are reported before.
    lean_imports.install()
    from checkpoint_tools.verifying.chat_ids import ChatIdsError
    from checkpoint_tools.verifying.comparison import VerificationError
    from megatron_anymal.data.records import DataError

    try:
        _verify(arguments, folder, export)
    except (VerificationError, ChatIdsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _verify(arguments: argparse.Namespace, folder: Path, export: Path) -> None:
    from checkpoint_tools.verifying.chat_ids import compare_chat_ids
    from checkpoint_tools.verifying.comparison import verify
    from checkpoint_tools.verifying.samples import choose_samples
    from megatron_anymal.data.tokenizer import Tokenizer
    from megatron_anymal.hf.remote_code import foreign_code

    config = config_of(store.read_manifest(folder, verify=True), folder, trust_plugins=arguments.trust_plugins)
    if not arguments.trust_remote_code and (foreign := foreign_code(export)):
        raise ConfigError(
            f"--export={str(export)!r}: {foreign[0]} differs from this installation's code and would be executed. "
            "Export again, or review the file and allow it with --trust-remote-code."
        )
    llama_only = json.loads((export / "config.json").read_text())["model_type"] == "llama"
    samples = choose_samples(config.model, config.data, arguments.data, arguments.samples, llama_only)
    verify(folder, config, export, samples)
    if (export / "tokenizer_config.json").is_file() and config.data.tokenizer:
        modalities = {} if llama_only else config.model.modalities
        compare_chat_ids(export, Tokenizer(config.data.tokenizer), modalities, config.data)


if __name__ == "__main__":
    sys.exit(main())
