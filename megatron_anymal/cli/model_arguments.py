"""Command-line arguments for the model, a training checkpoint or an exported folder, and for sampling."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.trust import FLAG
from megatron_anymal.config import ConfigError
from megatron_anymal.generation.model_folder import exported_config
from megatron_anymal.generation.sampling import Sampling

if TYPE_CHECKING:
    from megatron_anymal.generation.generator import Generator

DTYPES = ("auto", "float32", "bfloat16")
# Arguments that apply to one kind of folder only, and their spelling.
_OF_CHECKPOINTS = {
    "trust_plugins": FLAG,
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
}
_OF_EXPORTS = {"device": "--device", "dtype": "--dtype", "trust_remote_code": "--trust-remote-code"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every verb that loads one model."""
    parser.add_argument(
        "--checkpoint", required=True, help="folder of a training checkpoint, of its run, or of an export"
    )
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how a model is loaded."""
    native = parser.add_argument_group("training checkpoints")
    native.add_argument(FLAG, action="store_true", default=None, help="import the plug-ins that the checkpoint names")
    native.add_argument("--tensor-model-parallel-size", type=int, help="tensor-parallel size; default: all processes")
    native.add_argument("--pipeline-model-parallel-size", type=int, help="pipeline-parallel size; default: 1")
    exported = parser.add_argument_group("exported folders")
    exported.add_argument("--trust-remote-code", action="store_true", default=None, help="run the code in the folder")
    exported.add_argument("--device", help="device of the model; default: cuda if available, else cpu")
    exported.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights; default: auto, the dtype of the folder"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that control sampling."""
    default = Sampling()
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens)
    group.add_argument("--temperature", type=float, default=default.temperature, help="0: greedy")
    group.add_argument(
        "--top-p", type=float, default=default.top_p, help="sample from the likeliest tokens of this total probability"
    )
    group.add_argument(
        "--top-k", type=int, default=default.top_k, help="sample from this many of the likeliest tokens; 0: all"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=default.repetition_penalty, help="above 1: less repetition"
    )
    group.add_argument("--stop", action="append", default=[], help="an answer ends before this text; may be repeated")
    group.add_argument("--seed", type=int, default=default.seed, help="random seed")
    group.add_argument("--batch-size", type=int, default=64)
    group.add_argument(
        "--workers",
        type=_processes,
        help="processes that read media ahead of the model; default: this process's share of the cores but one, at "
        "most 8; 0: the model waits for its media",
    )


def _processes(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes; 0: none")
    return int(text)


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """Build the sampling settings from the command line.

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


def check_model(arguments: argparse.Namespace, *, untrained: bool = False) -> Optional[dict[str, Any]]:
    """Check the model's arguments before anything slow is imported; return an exported folder's config.json.

    Returns:
        None for a training checkpoint.

    Raises:
        CheckpointError, ConfigError: the folder does not hold a model, or the arguments do not apply to it.
    """
    folder = arguments.checkpoint
    exported = exported_config(Path(folder))
    if exported is None:
        _refuse(arguments, _OF_EXPORTS, f"{folder!r} is a training checkpoint; the option is for exported folders")
        return None
    _refuse(arguments, _OF_CHECKPOINTS, f"{folder!r} is an exported folder, which runs in one process")
    if untrained:
        raise ConfigError(
            f"--untrained: {folder!r} is an exported folder, which does not have initial values. Name a run."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"{folder!r} is an exported folder, which runs in one process. Start without torchrun, or name the "
            "training checkpoint."
        )
    return exported


def kinds_of(arguments: argparse.Namespace) -> Optional[dict[str, str]]:
    """Kind -> name of the modalities of `--checkpoint`, read from its settings.

    Returns:
        None if no manifest can be read, which loading will report.

    Raises:
        CheckpointError, ConfigError: as `check_model`.
    """
    model = _model_section(arguments)
    if model is None:
        return None
    return {section.get("kind") or name: name for name, section in model.get("modalities", {}).items()}


def discrete_of(arguments: argparse.Namespace) -> Optional[dict[str, dict[str, Any]]]:
    """Sections of `model.discrete` of the model in `--checkpoint`, by name, read from its settings.

    Returns:
        None if no manifest can be read, which loading will report.

    Raises:
        CheckpointError, ConfigError: as `check_model`.
    """
    model = _model_section(arguments)
    if model is None:
        return None
    discrete = model.get("discrete", {})
    sections: dict[str, dict[str, Any]] = (
        discrete["sections"] if isinstance(discrete.get("base_size"), int) else discrete
    )
    return sections


def _model_section(arguments: argparse.Namespace) -> Optional[dict[str, Any]]:
    """An export's config.json, or `model` of a checkpoint's configuration; None if no manifest can be read."""
    exported = check_model(arguments)
    if exported is not None:
        return exported
    folder = Path(arguments.checkpoint)
    manifests = map(_manifest, [folder, *store.committed(folder / "checkpoints"), *store.committed(folder)])
    manifest = next((one for one in manifests if one is not None), None)
    return None if manifest is None else manifest.config["model"]


def _manifest(folder: Path) -> Optional[store.Manifest]:
    try:
        return store.read_manifest(folder)
    except CheckpointError:
        return None


def load_generator(arguments: argparse.Namespace, *, untrained: bool = False, replicated: bool = False) -> Generator:
    """Load the model of `--checkpoint`.

    Args:
        untrained: keep the projectors' initial values.
        replicated: let processes beyond the parallel sizes hold further copies of the model.

    Raises:
        CheckpointError, ConfigError: the folder does not hold a model, or the arguments do not apply to it.
    """
    exported = check_model(arguments, untrained=untrained)
    if exported is None:
        generator = _of_checkpoint(arguments, untrained, replicated)
    else:
        generator = _of_export(arguments, exported)
    # Imports torch, as the model has by now.
    from megatron_anymal.generation.read_ahead import reading_processes

    generator.read_in_processes(reading_processes() if arguments.workers is None else arguments.workers)
    return generator


def _of_checkpoint(arguments: argparse.Namespace, untrained: bool, replicated: bool) -> Generator:
    from megatron_anymal.generation.checkpoint_generator import NativeGenerator

    return NativeGenerator.of_run(
        arguments.checkpoint,
        arguments.tensor_model_parallel_size,
        arguments.pipeline_model_parallel_size or 1,
        untrained=untrained,
        trust_plugins=bool(arguments.trust_plugins),
        replicated=replicated,
    )


def _of_export(arguments: argparse.Namespace, exported: dict[str, Any]) -> Generator:
    from megatron_anymal.generation.export_generator import ExportedGenerator

    return ExportedGenerator.of_folder(
        arguments.checkpoint,
        exported,
        arguments.device,
        arguments.dtype or "auto",
        trust_remote_code=bool(arguments.trust_remote_code),
    )


def model_fingerprint(arguments: argparse.Namespace) -> str:
    """Hash of the model of `--checkpoint` and of the number format it is computed in.

    Raises:
        CheckpointError, ConfigError: as `check_model`.
    """
    digest = hashlib.sha256()
    if check_model(arguments) is None:
        # It has the hashes of all files.
        digest.update((store.resolve(arguments.checkpoint) / store.MANIFEST).read_bytes())
    else:
        folder = Path(arguments.checkpoint)
        for path in sorted(folder.rglob("*.*")):
            content = path.read_bytes() if path.suffix == ".json" else b""
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} {arguments.dtype}".encode() + content)
    return digest.hexdigest()


def _refuse(arguments: argparse.Namespace, names: dict[str, str], reason: str) -> None:
    for name, written in names.items():
        if getattr(arguments, name) is not None:
            raise ConfigError(f"{written}: {reason}. Remove it.")
