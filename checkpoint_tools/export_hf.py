"""`python -m checkpoint_tools.export_hf --checkpoint CHECKPOINT --out FOLDER`: export a HuggingFace folder.

The folder loads with transformers alone: AutoModelForCausalLM and AutoProcessor with trust_remote_code=True or, with
`--llama-only` (or for a checkpoint without modalities), as a plain LlamaForCausalLM. Before the folder is published,
its logits are compared with the trainer's own (checkpoint_tools.verify).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint_tools.disk import what_failed
from megatron_anymal import lean_imports
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.trust import FLAG
from megatron_anymal.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the export; return the exit code (2: the export failed and nothing was written)."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_tools.export_hf", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or run folder for the newest one")
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument("--llama-only", action="store_true", help="export only the Llama, as a plain LlamaForCausalLM")
    parser.add_argument("--adapter", choices=("merged", "separate"), default="merged", help="how to export adapters")
    parser.add_argument("--max-shard-gib", type=float, default=5.0, help="maximum size of a weight file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FOLDER")
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of logits")
    parser.add_argument("--data", action="append", default=[], help="prepared folder to verify on; default: the run's")
    parser.add_argument("--samples", type=int, default=2, help="number of samples per modality to verify on")
    parser.add_argument(FLAG, action="store_true", help="run plug-ins named by the checkpoint")
    arguments = parser.parse_args(argv)
    try:
        out = Path(arguments.out).absolute()
        _check_arguments(arguments, out)
        folder = store.resolve(arguments.checkpoint)
    except (CheckpointError, ConfigError, OSError) as error:
        return _failed(str(error))
    # These take seconds to import, so wrong arguments are reported before.
    lean_imports.install()
    from checkpoint_tools.exporting.export import export
    from checkpoint_tools.verifying.chat_ids import ChatIdsError
    from checkpoint_tools.verifying.comparison import VerificationError
    from megatron_anymal.data.records import DataError
    from megatron_anymal.safetensors_io import TensorFileError

    try:
        export(arguments, folder, out)
    except (CheckpointError, ConfigError, DataError, TensorFileError) as error:
        return _failed(str(error))
    except (VerificationError, ChatIdsError) as error:
        return _failed(f"{error} Nothing was written.")
    except OSError as error:
        fix = "Free up space, or choose another location. Nothing was kept."
        return _failed(what_failed(error, Path(arguments.out), fix))
    return 0


def _failed(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _check_arguments(arguments: argparse.Namespace, out: Path) -> None:
    if arguments.max_shard_gib <= 0:
        raise ConfigError(f"--max-shard-gib={arguments.max_shard_gib:g} must be greater than 0.")
    if arguments.samples < 1:
        raise ConfigError(f"--samples={arguments.samples} must be at least 1. To skip verification, use --no-verify.")
    if not out.exists():
        return
    if not arguments.overwrite:
        raise ConfigError(f"--out={str(out)!r} exists. Choose another folder, or add --overwrite.")
    if not ((out / "config.json").is_file() and any(out.glob("model*.safetensors"))):
        raise ConfigError(f"--out={str(out)!r} is not an exported model and is not replaced. Choose another folder.")


if __name__ == "__main__":
    sys.exit(main())
