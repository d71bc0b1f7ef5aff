"""Write a layout as a configuration that inherits from the run's own and holds only its differences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.compose import default_config_dir
from megatron_anymal.config.parsing import leaves
from megatron_anymal.model.memory.sizes import Recompute
from megatron_anymal.planning.layouts.enumeration import Layout


def check_target(path: Path, config_dir: Path) -> None:
    """Refuse a file that could not inherit from the run's configuration.

    Raises:
        ConfigError: the folder does not exist, or the configuration is in another one.
    """
    if path.suffix != ".yaml":
        raise ConfigError(f"--write={path} must end with .yaml.")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"--write={path}: there is no folder {path.resolve().parent}. Create it.")
    if config_dir.resolve() not in (default_config_dir().resolve(), path.resolve().parent):
        raise ConfigError(
            f"--write={path}: a configuration inherits from its own folder and from the shipped ones. Write it to "
            f"{config_dir}, next to the one that it inherits from."
        )


def planned_config(config: RunConfig, layout: Layout, recompute: Recompute, gpu: str = "") -> RunConfig:
    """Return a copy of a configuration with a layout and its recomputation.

    Args:
        gpu: `trainer.gpu`.
    """
    result = copy.deepcopy(config)
    result.trainer.gpu = gpu
    result.model = layout.applied(result.model)
    result.model.recompute_granularity = recompute.granularity
    if recompute.granularity == "selective":
        result.model.recompute_modules = list(recompute.modules)
    if recompute.granularity == "full":
        result.model.recompute_method, result.model.recompute_num_layers = recompute.method, recompute.layers
    return result


def differences(base: RunConfig, result: RunConfig) -> dict[str, Any]:
    """Return the values that differ, by dotted key.

    Raises:
        ConfigError: an entry of `base` is missing, which a file that inherits from it cannot express.
    """
    before, after = dict(leaves(base.to_dict())), dict(leaves(result.to_dict()))
    gone = sorted(before.keys() - after.keys())
    if gone:
        raise ConfigError(f"--write: a file cannot remove {gone[0]} from the configuration that it inherits from.")
    return {key: value for key, value in after.items() if key not in before or before[key] != value}


def write_config(path: Path, inherited: str, changed: dict[str, Any], comment: str) -> None:
    """Write the file.

    Args:
        inherited: name of the configuration that it inherits from.
        changed: values by dotted key.
        comment: one line that says where the file comes from.
    """
    body: dict[str, Any] = {}
    for key, value in changed.items():
        section = body
        *outer, name = key.split(".")
        for part in outer:
            section = section.setdefault(part, {})
        section[name] = value
    text = yaml.safe_dump(body, sort_keys=False)
    path.write_text(f"# {comment}\ndefaults: [{inherited}, _self_]\n\n{text}")
