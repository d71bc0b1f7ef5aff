"""Which modalities exist, which one reads a file, and how plug-ins add more."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_anymal.config import DEFAULT_LIMITS, ConfigError, LimitsConfig, ModalityConfig
from megatron_anymal.modalities.base import MediaError, Modality, nearest

MODALITIES: dict[str, type[Modality]] = {}


def register(kind: str) -> Callable[[type[Modality]], type[Modality]]:
    """Class decorator: make a modality available as `kind`.

    Raises:
        ConfigError: `kind` already belongs to another class, or `probe` takes no limits.
    """

    def add(cls: type[Modality]) -> type[Modality]:
        other = MODALITIES.get(kind)
        if other is not None and other is not cls:
            raise ConfigError(
                f"The modality {kind!r} is already {other.__module__}.{other.__qualname__}; "
                f"{cls.__module__}.{cls.__qualname__} needs another name."
            )
        if "limits" not in inspect.signature(cls.probe).parameters:
            raise ConfigError(
                f"The modality {kind!r} ({cls.__module__}.{cls.__qualname__}): probe needs a fourth parameter, "
                "`limits: LimitsConfig`, the largest inputs to accept (data.limits)."
            )
        MODALITIES[kind] = cls
        return cls

    return add


def _class_of(kind: str) -> type[Modality]:
    if kind not in MODALITIES:
        raise ConfigError(
            f"There is no modality {kind!r}. {nearest(kind, MODALITIES)} A modality of your own is added with "
            "model.plugins."
        )
    return MODALITIES[kind]


def build_modality(name: str, config: ModalityConfig, limits: LimitsConfig = DEFAULT_LIMITS) -> Modality:
    """The modality of the section `model.modalities.NAME`; its kind is `config.kind`, or `name` where that is empty.

    Args:
        limits: largest inputs that its `load` accepts, a run's `data.limits`.

    Raises:
        ConfigError: an unknown kind, or options or an encoder that cannot work.
    """
    try:
        modality = _class_of(config.kind or name)(config)
    except ConfigError as error:
        raise ConfigError(f"model.modalities.{name}: {error}") from error
    modality.limits = limits
    return modality


def kind_for_extension(extension: str, kinds: Iterable[str]) -> str:
    """The kind among `kinds` that reads files with this extension.

    An extension of several parts ("left.jpg", as WebDataset names several files of one sample) is looked up whole
    first, then by its last part.

    Raises:
        MediaError: no kind or several kinds read it.
        ConfigError: `kinds` names a kind that does not exist.
    """
    extension = extension.lower().lstrip(".")
    classes = {kind: _class_of(kind) for kind in kinds}
    for candidate in dict.fromkeys((extension, extension.rpartition(".")[2])):
        found = [kind for kind, cls in classes.items() if candidate in cls.extensions]
        if len(found) == 1:
            return found[0]
        if found:
            raise MediaError(
                f"the extension {extension!r} belongs to several modalities ({', '.join(sorted(found))}): "
                "state the modality of this media item"
            )
    known = sorted({known for cls in classes.values() for known in cls.extensions})
    elsewhere = sorted(kind for kind, cls in MODALITIES.items() if extension.rpartition(".")[2] in cls.extensions)
    hint = f"; add a section model.modalities.{elsewhere[0]} to read it" if elsewhere else ""
    raise MediaError(
        f"no modality of this run reads the extension {extension!r} (known: {', '.join(known) or 'none'}){hint}"
    )


def load_plugins(paths: list[str]) -> None:
    """Import Python files that register modalities or encoders, each once in this process.

    Raises:
        ConfigError: a file that is missing or fails when imported.
    """
    for path in paths:
        file = Path(path).expanduser().resolve()
        # The name holds the whole path, so that two plug-ins of one file name do not collide.
        name = "megatron_anymal_plugin_" + "".join(c if c.isalnum() else "_" for c in str(file))
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, file) if file.is_file() else None
        if spec is None or spec.loader is None:
            raise ConfigError(f"model.plugins: {path} is not a Python file here. Correct the path.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ConfigError(f"model.plugins: {path} failed when imported: {error!r}.") from error
