"""Compose YAML files and command-line overrides into a `RunConfig`, with the origin of every value.

Hydra does the composition. Each source is checked against the schema first, so that a wrong key or type is reported
in the schema's terms, with the file or override that contains it.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from megatron_anymal.config.explain import explain
from megatron_anymal.config.parsing import SectionReader, entry_of, from_dict, hint_at, leaves
from megatron_anymal.config.schema import ConfigError, RunConfig

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# Name of the schema's defaults in the `defaults:` list of a file.
SCHEMA_NAME = "anymal"
# OmegaConf's resolver of environment variables.
_ENVIRONMENT = "oc.env"
# Sections that Hydra reads itself.
_HYDRA_SECTIONS = ("defaults", "hydra")


@dataclass
class Composed:
    """A composed configuration.

    Attributes:
        config: the typed configuration.
        origins: for every value, by dotted key: "default", "file DIR/NAME.yaml" or "override".
        files: the YAML files it was read from.
        reads_environment: a value may come from an environment variable.
    """

    config: RunConfig
    origins: dict[str, str]
    files: tuple[Path, ...]
    reads_environment: bool


def default_config_dir() -> Path:
    """Folder of the shipped YAML files: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "nemo_configs"
    return installed if installed.is_dir() else package.parent / "nemo_configs"


def config_folder(option: Optional[str]) -> Path:
    """Folder of the run's YAML files: that of --config-path, else the shipped ones.

    Raises:
        ConfigError: there is no such folder.
    """
    folder = Path(option).expanduser().resolve() if option else default_config_dir()
    if not folder.is_dir():
        raise ConfigError(f"--config-path={option}: there is no folder {folder}.")
    return folder


def compose(config_name: str, config_dir: Path, overrides: Sequence[str]) -> Composed:
    """Compose `config_dir/config_name.yaml` with the files it inherits from and with Hydra overrides.

    Args:
        config_name: file name, with or without `.yaml`.
        config_dir: folder of the file; the shipped configurations can be inherited from any folder.
        overrides: `key=value`, `+key=value` (add an entry of a dict), `++key=value`, `~key` (remove an entry).

    Raises:
        ConfigError: no such file, an unknown key, a value of the wrong type, or an override Hydra refuses.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config_dir = Path(config_dir).resolve()
    name = _existing_name(config_name, config_dir)
    _check_grammar(overrides)
    register_schema()
    search_path = search_path_override(config_dir)
    try:
        with initialize_config_dir(str(config_dir), version_base=None):
            loader = GlobalHydra.instance().config_loader()
            plan = loader.compute_defaults_list(name, [*search_path, *overrides], RunMode.RUN)
            sources = _Sources(config_dir)
            for item in plan.defaults:
                sources.add_file(item.config_path, item.package)
            if not sources.has_schema:
                raise ConfigError(
                    f"{config_dir / name}.yaml does not inherit the defaults. Begin it with "
                    f"`defaults: [{SCHEMA_NAME}, _self_]`."
                )
            marked = {o.input_line: sources.add_override(o) for o in plan.config_overrides if not o.is_hydra_override()}
            composed = hydra_compose(name, [*search_path, *(marked.get(text, text) for text in overrides)])
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_one_line(error)) from error
    assert isinstance(values, dict)
    values.pop("hydra", None)
    config = from_dict(typing.cast("dict[str, Any]", values), f"{config_dir / name}.yaml")
    origins = {key: sources.origins.get(key, "default") for key, _ in leaves(config.to_dict())}
    return Composed(config, origins, tuple(sources.files), sources.reads_environment)


def format_config(composed: Composed) -> str:
    """Format one aligned line per value: key, value (JSON) and origin."""
    rows = [(key, json.dumps(value), composed.origins[key]) for key, value in leaves(composed.config.to_dict())]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(max(len(value) for _, value, _ in rows), 48)
    return "\n".join(f"{key:<{key_width}}  {value:<{value_width}}  {origin}" for key, value, origin in rows)


def print_config(composed: Composed, *, explained: bool = False) -> None:
    """Print every value and its origin and, if `explained`, the documentation of its key."""
    print(explain(composed.config.to_dict(), composed.origins) if explained else format_config(composed))


def register_schema() -> None:
    """Register the defaults of the schema with Hydra, under `SCHEMA_NAME`.

    They are plain dicts: Hydra cannot add an entry to a dict of typed sections with `+data.train.extra.path=...`, and
    the type checks of this package have better messages.
    """
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=SCHEMA_NAME, node=RunConfig().to_dict())


def search_path_override(config_dir: Path) -> list[str]:
    """Hydra override that lets files in `config_dir` inherit from the shipped configurations."""
    shipped = default_config_dir().resolve()
    if config_dir == shipped or not shipped.is_dir():
        return []
    return [f'hydra.searchpath=["file://{shipped}"]']


class _Sources:
    """The files and overrides of one composition, checked one by one in the order that Hydra merges them."""

    def __init__(self, config_dir: Path) -> None:
        self.config_dir = config_dir
        self.origins: dict[str, str] = {}
        self.has_schema = False
        self.files: list[Path] = []
        self.reads_environment = False
        # Entries of the dicts of sections, such as data.train.captions.
        self.entries: set[str] = set()

    def add_file(self, config_path: str | None, package: str | None) -> None:
        """Check one item of Hydra's defaults list: a file, the schema, or one of Hydra's own entries."""
        if config_path is None or config_path.startswith("hydra/"):
            return
        if config_path == SCHEMA_NAME:
            self.has_schema = True
            return
        for folder in (self.config_dir, default_config_dir().resolve()):
            path = folder / f"{config_path}.yaml"
            if path.is_file():
                break
        else:
            raise ConfigError(f"{config_path}.yaml, named in a `defaults:` list, is not in {self.config_dir}.")
        self.files.append(path)
        self.reads_environment |= _ENVIRONMENT in path.read_text()
        shown = f"file {folder.name}/{config_path}.yaml"
        read = read_yaml(path)
        _check_hydra_section(read, shown)
        values = {key: value for key, value in read.items() if key not in _HYDRA_SECTIONS}
        self._add(_nested(package, values) if package else values, shown, shown)

    def add_override(self, override: Override) -> str:
        """Check one override and return it in the form that Hydra accepts.

        An override of a default inside an existing entry of `model.modalities` or `data.train` gets the prefix `++`,
        since Hydra has no defaults there.
        """
        text = override.input_line or ""
        self.reads_environment |= _ENVIRONMENT in text
        key = override.key_or_group
        if override.is_delete():
            self._delete(key, text)
            return text
        entry = entry_of(key)
        marked = text
        if entry is not None and not (override.is_add() or override.is_force_add()) and key != entry:
            if entry not in self.entries:
                SectionReader(f"override '{text}'").read(_nested(key, override.value()), RunConfig, "")
                raise ConfigError(self._no_such_entry(entry, text))
            marked = f"++{text}"
        self._add(_nested(key, override.value()), f"override '{text}'", "override")
        return marked

    def _add(self, values: Mapping[str, Any], source: str, origin: str) -> None:
        SectionReader(source, interpolations=True).read(values, RunConfig, "")
        for key, _ in leaves(values):
            self.origins[key] = origin
            entry = entry_of(key)
            if entry is not None:
                self.entries.add(entry)

    def _delete(self, key: str, text: str) -> None:
        if hint_at(key) is not None and entry_of(key) != key:
            raise ConfigError(
                f"override '{text}': only entries of a dict, such as ~model.modalities.audio, can be removed; "
                f"{key} is a fixed option. Set it instead."
            )
        if entry_of(key) == key and key not in self.entries:
            raise ConfigError(self._no_such_entry(key, text))
        for known in [known for known in self.origins if known == key or known.startswith(f"{key}.")]:
            del self.origins[known]
        self.entries.discard(key)

    def _no_such_entry(self, entry: str, text: str) -> str:
        section, _, name = entry.rpartition(".")
        siblings = sorted(known.rpartition(".")[2] for known in self.entries if known.rpartition(".")[0] == section)
        near = difflib.get_close_matches(name, siblings, n=1)
        hint = f" Did you mean {section}.{near[0]}?" if near else ""
        listed = ", ".join(siblings) or "nothing"
        advice = "" if text.startswith("~") else " To add one, put + before it."
        return f"override '{text}': {section} has no entry '{name}' (it holds {listed}).{hint}{advice}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file as Hydra does, leaving interpolations as text.

    Raises:
        ConfigError: not a mapping.
        yaml.YAMLError: invalid YAML; the message names the file and the line.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections such as `trainer:` and `model:`.")
    return typing.cast("dict[str, Any]", values)


def _check_grammar(overrides: Sequence[str]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"override '{text}' is not of the form key=value: {' '.join(str(error).split())}. A value with special "
                "characters needs its own quotes inside the shell's: 'key=\"<value>\"'."
            ) from error
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")):
            raise ConfigError(_no_effect(f"override '{text}'", key))
        if override.is_sweep_override():
            raise ConfigError(
                f"override '{text}' lists several values to try. Give one, a list ({key}=[a,b]) or, for a text with "
                f"commas, quotes ({key}='\"a,b\"')."
            )


def _check_hydra_section(values: Mapping[str, Any], shown: str) -> None:
    """Refuse Hydra's own keys in a file, on which nothing here acts."""
    groups = [str(key) for item in values.get("defaults") or () if isinstance(item, Mapping) for key in item]
    named = [group.split()[-1].lstrip("/") for group in groups]
    keys = [f"hydra.{key}" for key in values.get("hydra") or ()]
    for key in [*keys, *(group for group in named if group.startswith("hydra/"))]:
        raise ConfigError(_no_effect(shown, key))


def _no_effect(source: str, key: str) -> str:
    return (
        f"{source}: {key} has no effect: Hydra only composes the configuration, from this folder and the shipped one; "
        "it writes no file and sets up no logging. Remove it."
    )


def _existing_name(config_name: str, config_dir: Path) -> str:
    name = config_name[: -len(".yaml")] if config_name.endswith(".yaml") else config_name
    if (config_dir / f"{name}.yaml").is_file():
        return name
    known = sorted(path.stem for path in config_dir.glob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"The folder holds {', '.join(known) or 'no YAML file'}."
    raise ConfigError(f"--config-name={config_name}: no file {name}.yaml in {config_dir}. {hint}")


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the key "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _one_line(error: BaseException) -> str:
    """Join the messages of an exception and its cause on one line."""
    parts = [str(error)] + ([str(error.__cause__)] if error.__cause__ is not None else [])
    return " ".join(" ".join(parts).split())
