"""Validation of mixtures: the datasets' weights, and the stages of `data.schedule`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

from megatron_anymal.config.data_section import DataConfig, DatasetConfig, StageConfig
from megatron_anymal.config.schema import ConfigError

# The global order is built in blocks with at least two slots per data set: a smaller share would make them huge.
SMALLEST_SHARE = 1e-5

_UNITS = ("sample", "token")


def check_mixtures(data: DataConfig, max_steps: int) -> None:
    """Reject weights of datasets and stages that cannot work or would be ignored.

    Args:
        max_steps: `trainer.max_steps`.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    for split, datasets in (("train", data.train), ("validation", data.validation)):
        for name, dataset in datasets.items():
            if not (dataset.weight > 0 and math.isfinite(dataset.weight)):
                raise ConfigError(f"data.{split}.{name}.weight={dataset.weight} must be above 0.")
            if dataset.type and not (split == "train" and data.schedule):
                why = "without data.schedule" if split == "train" else "in validation"
                raise ConfigError(f"data.{split}.{name}.type={dataset.type!r} has no effect {why}. Remove it.")
            if dataset.type in datasets:
                raise ConfigError(
                    f"data.{split}.{name}.type={dataset.type!r} is also the name of a dataset. Rename one of them."
                )
        if not (split == "train" and data.schedule):
            weights = {name: dataset.weight for name, dataset in datasets.items()}
            _check_shares(weights, f"data.{split}", ".weight", "remove the data set")
    if data.schedule:
        for number in range(len(data.schedule)):
            _check_stage(data, number)
        _check_datasets(data)
        _check_steps(data.schedule, max_steps)


def _check_shares(weights: Mapping[str, float], where: str, what: str, otherwise: str) -> None:
    total = sum(weights.values())
    for name, weight in weights.items():
        if 0 < weight < SMALLEST_SHARE * total:
            raise ConfigError(
                f"{where}.{name}{what}={weight} is less than {SMALLEST_SHARE} of the mix. Raise it, or {otherwise}."
            )


def _check_datasets(data: DataConfig) -> None:
    """Reject datasets and settings of datasets that no stage uses."""
    named = {key for stage in data.schedule for key in stage.weights}
    mixes = [stage.weights_of(data.train) for stage in data.schedule]
    for name, dataset in data.train.items():
        where = f"data.train.{name}"
        if not any(mix[name] for mix in mixes):
            raise ConfigError(f"{where} has a weight above 0 in no stage of data.schedule. Add one, or remove it.")
        if dataset.type and dataset.type not in named:
            raise ConfigError(f"{where}.type={dataset.type!r} has no effect: no stage of data.schedule names it.")
        if dataset.weight != DatasetConfig().weight and not dataset.type:
            raise ConfigError(
                f"{where}.weight={dataset.weight} has no effect with data.schedule, whose stages have weights of their "
                f"own. Remove it; or set {where}.type, and let stages name the type: it then counts within the type."
            )


def _check_stage(data: DataConfig, number: int) -> None:
    stage, where = data.schedule[number], f"data.schedule[{number}]"
    if stage.by not in _UNITS:
        raise ConfigError(f"{where}.by={stage.by!r} is not one of {', '.join(_UNITS)}.")
    if stage.steps < 0:
        raise ConfigError(f"{where}.steps={stage.steps} must be at least 0.")
    if stage.name and stage.name in [other.name for other in data.schedule[:number]]:
        raise ConfigError(f"{where}.name={stage.name!r} is also the name of an earlier stage. Rename one of them.")
    for key, weight in stage.weights.items():
        _check_key(data.train, key, f"{where}.weights")
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(f"{where}.weights.{key}={weight} must be at least 0; 0 leaves it out of the stage.")
    for name, dataset in data.train.items():
        if name in stage.weights and dataset.type in stage.weights:
            raise ConfigError(
                f"{where}.weights names data.train.{name} twice: by its name and by its type {dataset.type!r}. Remove "
                "one of them."
            )
    if not any(stage.weights.values()):
        raise ConfigError(
            f"{where}.weights uses no dataset. Give a weight above 0 to at least one of {_listed(data.train)}."
        )
    if stage.by == "sample":
        _check_shares(stage.weights_of(data.train), f"{where}.weights", "", "set it to 0")


def _check_key(datasets: Mapping[str, DatasetConfig], key: str, where: str) -> None:
    types = {dataset.type for dataset in datasets.values() if dataset.type}
    if key in datasets or key in types:
        return
    near = difflib.get_close_matches(key, [*datasets, *types], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"{where} names {key!r}, which is neither a dataset of data.train ({_listed(datasets)}) nor the type of one "
        f"({_listed(sorted(types))}).{hint}"
    )


def _check_steps(schedule: list[StageConfig], max_steps: int) -> None:
    *earlier, last = schedule
    for number, stage in enumerate(earlier):
        if not stage.steps:
            raise ConfigError(f"data.schedule[{number}].steps is missing: only the last stage may leave it out.")
    total = sum(stage.steps for stage in schedule)
    if last.steps and total != max_steps:
        raise ConfigError(
            f"The stages of data.schedule have {total} steps, but trainer.max_steps={max_steps}. Set "
            f"trainer.max_steps={total}, or remove data.schedule[{len(earlier)}].steps: the last stage then lasts up "
            "to trainer.max_steps."
        )
    if total >= max_steps and not last.steps:
        raise ConfigError(
            f"The run ends at trainer.max_steps={max_steps}, before the last stage of data.schedule begins at step "
            f"{total}. Raise trainer.max_steps, or remove the stage."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
