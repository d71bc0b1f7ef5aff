"""`python -m checkpoint_tools.import_hf --hf FOLDER --out CHECKPOINT`: import HuggingFace Llama weights.

The result can be used as `model.language_model.checkpoint` under any parallel layout and preserves the weights bit for
bit. To resume an interrupted import, run the same command again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoint_tools.disk import what_failed
from megatron_anymal import lean_imports
from megatron_anymal.checkpoint.store import MANIFEST, CheckpointError
from megatron_anymal.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the import; return the exit code (2: the import failed and CHECKPOINT is unchanged)."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_tools.import_hf", description=__doc__)
    parser.add_argument("--hf", required=True, type=Path, help="HuggingFace folder with a Llama as safetensors")
    parser.add_argument("--out", required=True, type=Path, help="checkpoint folder to create")
    parser.add_argument(
        "--encoder", action="append", default=[], metavar="NAME=FOLDER", help="also copy the encoder of modality NAME"
    )
    parser.add_argument(
        "--processes", type=int, default=min(os.cpu_count() or 1, 4), help="worker processes; default: cores, up to 4"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing CHECKPOINT")
    arguments = parser.parse_args(argv)
    try:
        encoders = dict(_named(option) for option in arguments.encoder)
        _check(arguments, encoders)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # These take seconds to import, so wrong paths are reported before.
    lean_imports.install()
    from checkpoint_tools.importing.llama import import_llama
    from checkpoint_tools.importing.workers import WorkerError
    from megatron_anymal.safetensors_io import TensorFileError

    try:
        import_llama(arguments.hf, arguments.out, encoders, arguments.processes)
    except (CheckpointError, ConfigError, TensorFileError, WorkerError) as error:
        message = " ".join(str(error).replace("model.language_model.path", "--hf").split())
    except OSError as error:
        message = what_failed(error, arguments.out, "Free up space and run the command again to resume.")
    else:
        return 0
    print(f"error: {message}", file=sys.stderr)
    return 2


def _check(arguments: argparse.Namespace, encoders: Mapping[str, Path]) -> None:
    hf, out = arguments.hf, arguments.out.absolute()
    if not (hf / "config.json").is_file():
        raise ConfigError(f"--hf={str(hf)!r} has no config.json.")
    for name, folder in encoders.items():
        if not folder.is_dir():
            raise ConfigError(f"--encoder={name}={folder}: there is no such folder.")
    if arguments.processes < 1:
        raise ConfigError(f"--processes={arguments.processes} must be at least 1.")
    if not out.exists():
        return
    if not arguments.overwrite:
        raise ConfigError(f"--out={str(out)!r} exists. Choose another folder, or add --overwrite.")
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"--out={str(out)!r} exists and is not a checkpoint: it is not replaced.")


def _named(given: str) -> tuple[str, Path]:
    name, _, folder = given.partition("=")
    if not (name and folder and Path(name).name == name):
        raise ConfigError(f"--encoder={given!r} is not NAME=FOLDER.")
    return name, Path(folder)


if __name__ == "__main__":
    sys.exit(main())
