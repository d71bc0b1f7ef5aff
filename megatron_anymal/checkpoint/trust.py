"""Guard against running the plug-ins that a checkpoint's configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.compose import from_dict

# Option with which the user allows importing the Python files that a checkpoint names.
FLAG = "--trust-plugins"


def config_of(manifest: Manifest, folder: Path, *, trust_plugins: bool) -> RunConfig:
    """Return the configuration in a checkpoint's manifest, for building its model.

    Raises:
        ConfigError: the configuration is damaged, or names plug-ins that are not trusted.
    """
    config = from_dict(manifest.config)
    refuse_plugins(config.model.plugins, f"the checkpoint {str(folder)!r}", FLAG, trust_plugins=trust_plugins)
    return config


def refuse_plugins(plugins: Sequence[str], origin: str, flag: str, *, trust_plugins: bool) -> None:
    """Refuse the plug-ins of a configuration that is not the user's own, unless they are trusted.

    Args:
        plugins: the configuration's `model.plugins`.
        origin: where the configuration comes from, for the message.
        flag: the option that allows them, for the message.

    Raises:
        ConfigError: there are untrusted plug-ins; the message names the files, the configuration's origin and the flag.
    """
    if plugins and not trust_plugins:
        named = ", ".join(str(Path(path).expanduser().absolute()) for path in plugins)
        raise ConfigError(
            f"model.plugins: {origin} names {named}, Python code that would run here. Review it, then allow it with "
            f"{flag}."
        )
