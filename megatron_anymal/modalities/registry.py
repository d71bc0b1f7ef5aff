"""Registry of modalities: registration, lookup by file extension, and plug-ins."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
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
                f"The modality {kind!r} is already registered by {other.__module__}.{other.__qualname__}; "
                f"{cls.__module__}.{cls.__qualname__} needs another name."
            )
        if "limits" not in inspect.signature(cls.probe).parameters:
            raise ConfigError(
                f"The modality {kind!r} ({cls.__module__}.{cls.__qualname__}): probe needs a fourth parameter, "
                "`limits: LimitsConfig`, the maximum input sizes (data.limits)."
            )
        MODALITIES[kind] = cls
        return cls

    return add


def _class_of(kind: str) -> type[Modality]:
    if kind not in MODALITIES:
        raise ConfigError(
            f"There is no modality {kind!r}. {nearest(kind, MODALITIES)} Custom modalities are added with "
            "model.plugins."
        )
    return MODALITIES[kind]


def build_modality(name: str, config: ModalityConfig, limits: LimitsConfig = DEFAULT_LIMITS) -> Modality:
    """Build the modality of the section `model.modalities.NAME`; its kind is `config.kind`, or `name` if that is empty.

    Args:
        limits: maximum input sizes for `load`: a run's `data.limits`.

    Raises:
        ConfigError: the kind is unknown, or the options or the encoder are invalid.
    """
    try:
        modality = _class_of(config.kind or name)(config)
    except ConfigError as error:
        raise ConfigError(f"model.modalities.{name}: {error}") from error
    modality.limits = limits
    return modality


def kind_for_extension(extension: str, kinds: Iterable[str]) -> str:
    """The kind among `kinds` that reads files with this extension.

    A compound extension ("left.jpg", which WebDataset uses for several files of one sample) is looked up as a whole
    first, then by its last component.

    Raises:
        MediaError: no kind or several kinds read it.
        ConfigError: `kinds` contains an unknown kind.
    """
    return _kind_for(extension.lower().lstrip("."), tuple((kind, _class_of(kind)) for kind in kinds))


@lru_cache(maxsize=256)
def _kind_for(extension: str, classes: tuple[tuple[str, type[Modality]], ...]) -> str:
    for candidate in dict.fromkeys((extension, extension.rpartition(".")[2])):
        matches = [kind for kind, cls in classes if candidate in cls.extensions]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise MediaError(
                f"the extension {extension!r} belongs to several modalities ({', '.join(sorted(matches))}): "
                "state the modality of this media item"
            )
    known = sorted({known for _, cls in classes for known in cls.extensions})
    elsewhere = sorted(kind for kind, cls in MODALITIES.items() if extension.rpartition(".")[2] in cls.extensions)
    hint = f"; add a section model.modalities.{elsewhere[0]} to read it" if elsewhere else ""
    raise MediaError(
        f"no modality of this run reads the extension {extension!r} (known: {', '.join(known) or 'none'}){hint}"
    )


def load_plugins(paths: list[str]) -> None:
    """Import Python files that register modalities or encoders, each once per process.

    Raises:
        ConfigError: a file is missing or cannot be imported.
    """
    for path in paths:
        file = Path(path).expanduser().resolve()
        # The module name contains the whole path, so that plug-ins with the same file name do not collide.
        name = "megatron_anymal_plugin_" + "".join(c if c.isalnum() else "_" for c in str(file))
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, file) if file.is_file() else None
        if spec is None or spec.loader is None:
            raise ConfigError(f"model.plugins: {path} is not an existing Python file. Correct the path.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ConfigError(f"model.plugins: {path} cannot be imported: {error!r}.") from error
