"""Self-contained `.nemo` archives: the configuration, all weights, and the folders named in the configuration.

An archive is an uncompressed tar with
    model_config.yaml            configuration, including the Llama's; paths into the archive begin with "nemo:"
    model_weights.safetensors    all weights, unsharded, including frozen ones
    encoders/NAME/               folder of each encoder that has one, since its preprocessing is part of the model
    tokenizer/
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_anymal.config import ConfigError, LanguageModelConfig, RunConfig
from megatron_anymal.config.compose import from_dict
from megatron_anymal.safetensors_io import SafetensorsFile, TensorFileError

CONFIG_NAME = "model_config.yaml"
WEIGHTS_NAME = "model_weights.safetensors"
# Marks a path into the archive.
PREFIX = "nemo:"
# Weights in the formats of other libraries, and documentation, which a HuggingFace folder may also contain.
_UNUSED_SUFFIXES = {".h5", ".msgpack", ".ot", ".onnx", ".md"}


def write(path: Path, config_yaml: str, folders: Mapping[str, Path], tensors: Mapping[str, Tensor]) -> None:
    """Write an archive atomically: to a staging directory first, then renamed to `path`.

    Args:
        config_yaml: contents of model_config.yaml.
        folders: path in the archive -> folder (or single file) to copy.
        tensors: all weights.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as staging:
        root = Path(staging) / "archive"
        root.mkdir()
        (root / CONFIG_NAME).write_text(config_yaml, encoding="utf-8")
        for name, source in folders.items():
            _copy(source, root / name)
        save_file(_unshared(tensors), root / WEIGHTS_NAME, metadata={"format": "pt"})
        packed = Path(staging) / path.name
        with tarfile.open(packed, "w:") as tar:
            for member in sorted(root.rglob("*")):
                tar.add(member, arcname=str(member.relative_to(root)), recursive=False)
        os.replace(packed, path)


def read(path: Path, folder: Path) -> tuple[str, SafetensorsFile]:
    """Open an archive and unpack everything except the weights to `folder`.

    Returns:
        The text of its configuration, and its weights.

    Raises:
        ConfigError: there is no such file, or it is not an archive written by `write`.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}. Give the path of a .nemo archive written by save_to.")
    try:
        with tarfile.open(path, "r:") as tar:
            members = {member.name.removeprefix("./"): member for member in tar.getmembers()}
            if CONFIG_NAME not in members or WEIGHTS_NAME not in members:
                raise ConfigError(
                    f"{path} holds no {CONFIG_NAME} or {WEIGHTS_NAME}: it is not an archive of this model."
                )
            weights = members.pop(WEIGHTS_NAME)
            tar.extractall(folder, members=list(members.values()), filter="data")
    except tarfile.TarError as error:
        raise ConfigError(f"{path} cannot be read as a .nemo archive: {error}. Save or copy it again.") from error
    try:
        tensors = SafetensorsFile(path, weights.offset_data)
    except TensorFileError as error:
        raise ConfigError(str(error)) from None
    return (folder / CONFIG_NAME).read_text(encoding="utf-8"), tensors


def portable(config: RunConfig, llama: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Path]]:
    """Point the folders of a configuration into the archive.

    Paths of data folders and plug-in files are kept, since they are not part of the model.

    Args:
        config: the run's configuration.
        llama: configuration of its Llama, as keys of a transformers LlamaConfig.

    Returns:
        The changed configuration, and the folders to copy: path in the archive -> source.
    """
    result = from_dict(config.to_dict())
    folders: dict[str, Path] = {}
    freeze = result.model.language_model.freeze
    result.model.language_model = LanguageModelConfig(config=dict(llama), load_weights=False, freeze=freeze)
    for name, modality in result.model.modalities.items():
        if modality.encoder.path:
            folders[f"encoders/{name}"] = Path(modality.encoder.path)
            modality.encoder.path = f"{PREFIX}encoders/{name}"
    if result.data.tokenizer:
        folders["tokenizer"] = Path(result.data.tokenizer)
        result.data.tokenizer = f"{PREFIX}tokenizer"
    # The archive's weights already include what this would load.
    result.model.restore_from_path = ""
    if result.model.discrete_rows == "none":
        # Rows that come from nowhere else must be able to train; those of the archive are loaded all the same.
        result.model.discrete_rows = "new"
    return result, folders


def unpacked(config: RunConfig, folder: Path) -> RunConfig:
    """Point the paths of a configuration from `portable` to the unpacked `folder`."""
    result = from_dict(config.to_dict())

    def local(path: str) -> str:
        return str(folder / path.removeprefix(PREFIX)) if path.startswith(PREFIX) else path

    for modality in result.model.modalities.values():
        modality.encoder.path = local(modality.encoder.path)
    result.data.tokenizer = local(result.data.tokenizer)
    return result


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, target)
        return
    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix not in _UNUSED_SUFFIXES and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, contiguous and without shared memory (tied weights), as safetensors requires."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        if whole.untyped_storage().data_ptr() in seen:
            whole = whole.clone()
        seen.add(whole.untyped_storage().data_ptr())
        result[name] = whole
    return result
