"""The command line's model: a training checkpoint or an exported folder, told apart by what the folder holds."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.trust import FLAG
from megatron_anymal.config import ConfigError
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.generator import Generator
from megatron_anymal.generation.sampling import Sampling

MODEL_TYPE = "anymal"
DTYPES = ("auto", "float32", "bfloat16")
# Arguments that one kind of folder alone takes, and how they are written.
_OF_CHECKPOINTS = {
    "trust_plugins": FLAG,
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
}
_OF_EXPORTS = {"device": "--device", "dtype": "--dtype", "trust_remote_code": "--trust-remote-code"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What every verb that loads a model takes."""
    parser.add_argument(
        "--checkpoint", required=True, help="a training checkpoint's or its run's folder, or an exported folder"
    )
    native = parser.add_argument_group("of a training checkpoint")
    native.add_argument(FLAG, action="store_true", default=None, help="import plug-ins that the checkpoint names")
    native.add_argument("--tensor-model-parallel-size", type=int, help="default: all processes")
    native.add_argument("--pipeline-model-parallel-size", type=int, help="default: 1")
    exported = parser.add_argument_group("of an exported folder")
    exported.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run the code that the folder holds"
    )
    exported.add_argument("--device", help="default: cuda where there is one, else cpu")
    exported.add_argument("--dtype", choices=DTYPES, help="default: auto, the folder's")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How the answers are made."""
    default = Sampling()
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens)
    group.add_argument("--temperature", type=float, default=default.temperature, help="0: greedy")
    group.add_argument("--top-p", type=float, default=default.top_p, help="the likeliest tokens that make this share")
    group.add_argument("--top-k", type=int, default=default.top_k, help="this many of the likeliest tokens; 0: all")
    group.add_argument(
        "--repetition-penalty", type=float, default=default.repetition_penalty, help="above 1: repeat less"
    )
    group.add_argument("--stop", action="append", default=[], help="an answer ends before this text; may be repeated")
    group.add_argument("--seed", type=int, default=default.seed, help="what chance depends on")
    group.add_argument("--batch-size", type=int, default=64)


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """How the command line wants the answers made.

    Raises:
        ConfigError: a value out of range.
    """
    return Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
    )


def load_generator(arguments: argparse.Namespace, *, untrained: bool = False) -> Generator:
    """The model of `--checkpoint`; with `untrained`, its projectors have their initial values.

    Raises:
        CheckpointError, ConfigError: the folder holds no model, or the arguments do not fit what it holds.
    """
    folder = arguments.checkpoint
    exported = _exported_config(Path(folder))
    if exported is None:
        _refuse(arguments, _OF_EXPORTS, f"{folder!r} is a training checkpoint; only an exported folder takes it")
        return NativeGenerator.of_run(
            folder,
            arguments.tensor_model_parallel_size,
            arguments.pipeline_model_parallel_size or 1,
            untrained=untrained,
            trust_plugins=bool(arguments.trust_plugins),
        )
    _refuse(arguments, _OF_CHECKPOINTS, f"{folder!r} is an exported folder, which one process answers from")
    if untrained:
        raise ConfigError(f"--untrained: {folder!r} is an exported folder, which holds no initial values. Name a run.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"{folder!r} is an exported folder, which one process answers from. Start without torchrun, or name the "
            "training checkpoint."
        )
    return ExportedGenerator.of_folder(
        folder,
        exported,
        arguments.device,
        arguments.dtype or "auto",
        trust_remote_code=bool(arguments.trust_remote_code),
    )


def _exported_config(folder: Path) -> Optional[dict[str, Any]]:
    """An exported folder's config.json; None where the folder holds a checkpoint.

    Raises:
        CheckpointError: it holds neither.
    """
    if (folder / store.MANIFEST).is_file():
        return None
    path = folder / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{str(path)!r} is damaged ({error}). Export again.") from None
        found = config.get("model_type") if isinstance(config, dict) else None
        if found != MODEL_TYPE:
            raise CheckpointError(
                f"{str(path)!r} has the model_type {found!r}, not {MODEL_TYPE!r}. Name a folder that this trainer "
                "exported, or a training checkpoint."
            )
        return config
    if not any(list(place.glob("step_*")) for place in (folder, folder / "checkpoints")):
        raise CheckpointError(
            f"There is no checkpoint in {str(folder)!r}: no {store.MANIFEST}, no step_* and no checkpoints/step_*, and "
            "no config.json of an exported folder either. Name the folder of a checkpoint, of its run, or an exported "
            "one."
        )
    return None


def _refuse(arguments: argparse.Namespace, names: dict[str, str], reason: str) -> None:
    for name, written in names.items():
        if getattr(arguments, name) is not None:
            raise ConfigError(f"{written}: {reason}. Leave it away.")
