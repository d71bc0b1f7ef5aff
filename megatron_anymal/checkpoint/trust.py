"""A checkpoint's configuration, whose plug-ins are code that its reader may not know."""

from __future__ import annotations

from pathlib import Path

from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.compose import from_dict

# What the user says to import Python files that a checkpoint names.
FLAG = "--trust-plugins"


def config_of(manifest: Manifest, folder: Path, *, trust_plugins: bool) -> RunConfig:
    """The configuration in a checkpoint's manifest, for whoever builds its model.

    Raises:
        ConfigError: it is damaged, or names plug-ins and they are not trusted.
    """
    config = from_dict(manifest.config)
    refuse_plugins(config, f"the checkpoint {str(folder)!r}", FLAG, trust_plugins=trust_plugins)
    return config


def refuse_plugins(config: RunConfig, origin: str, flag: str, *, trust_plugins: bool) -> None:
    """Refuse the plug-ins of a configuration that is not the user's own, unless they are trusted.

    Raises:
        ConfigError: naming the files, where the configuration comes from, and the flag.
    """
    if config.model.plugins and not trust_plugins:
        named = ", ".join(str(Path(path).expanduser().absolute()) for path in config.model.plugins)
        raise ConfigError(
            f"model.plugins: {origin} names {named}, Python code that would run here. Read it, then allow it with "
            f"{flag}."
        )
