"""Folders of classifiers: what their JSON says, and hashes of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.config import ConfigError
from megatron_anymal.generation.model_folder import exported_config
from megatron_anymal.modalities.base import nearest

# Kind -> end of its architecture's name, what it does, and the files of which one holds the preprocessing.
_OF_KIND = {
    "image": ("ForImageClassification", "image classification", ("preprocessor_config.json",)),
    "text": ("ForSequenceClassification", "text classification", ("tokenizer.json", "tokenizer_config.json")),
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check_folder(kind: str, folder: Path, labels: Sequence[str], where: str) -> None:
    """Check that a folder holds a classifier of this kind with these labels, without loading it.

    Args:
        where: the classifier's section, for messages.

    Raises:
        ConfigError: naming the folder or the label, and the fix.
    """
    if not folder.is_dir():
        raise ConfigError(f"{where}.path: there is no folder {str(folder)!r}. Correct the path.")
    if kind not in _OF_KIND:
        try:
            exported_config(folder)
        except CheckpointError as error:
            raise ConfigError(f"{where}.path: {error}") from None
        return
    ending, called, files = _OF_KIND[kind]
    config = _settings(folder, where)
    architectures = config.get("architectures") or ["none"]
    if not str(architectures[0]).endswith(ending):
        raise ConfigError(
            f"{where}.path: {str(folder)!r} holds {architectures[0]}, which is not for {called} (...{ending}). "
            "Correct the path, or `kind`."
        )
    if config.get("auto_map"):
        raise ConfigError(f"{where}.path: {str(folder)!r} needs Python code of its own (auto_map), which is never run.")
    known = config.get("id2label")
    if not isinstance(known, dict) or not known:
        raise ConfigError(f"{where}.path: {str(folder)!r}: its config.json has no id2label, so labels have no names.")
    for label in labels:
        if label not in known.values():
            raise ConfigError(
                f"{where}.labels: {label!r} is not a label of {str(folder)!r}. {nearest(label, known.values())}"
            )
    if not any((folder / name).is_file() for name in files):
        raise ConfigError(f"{where}.path: {str(folder)!r} has no {' or '.join(files)}. Use a complete folder.")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise ConfigError(
            f"{where}.path: {str(folder)!r} has no weights as safetensors ({' or '.join(_WEIGHTS)}). Save it with "
            "transformers' save_pretrained."
        )


def content_hash(folder: Path) -> str:
    """Hash of a folder's files; a training checkpoint's manifest holds those of its own.

    Raises:
        CheckpointError, NoneLeft: the folder has no valid checkpoint.
    """
    digest = hashlib.sha256()
    if (folder / "config.json").is_file():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        digest.update((store.resolve(str(folder)) / store.MANIFEST).read_bytes())
    return digest.hexdigest()


def _settings(folder: Path, where: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}.path: {str(path)!r} cannot be read as a model's settings: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}.path: {str(path)!r} does not hold a model's settings.")
    return value
