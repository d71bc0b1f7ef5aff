"""Validation of `model.multiplex`: several alignments in one run, each as if it ran alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from megatron_anymal.config.data_section import DataConfig
from megatron_anymal.config.model_section import ModelConfig
from megatron_anymal.config.optim_section import AlignmentConfig
from megatron_anymal.config.schema import ConfigError, TrainerConfig


def check_multiplex(job: str, trainer: TrainerConfig, model: ModelConfig, data: DataConfig) -> None:
    """Reject alignments that cannot share a run, or would not train as they do alone.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    if not model.multiplex:
        return
    _check_shared(job, model, data)
    _check_replaced(trainer, model)
    for name in model.modalities:
        if name not in model.multiplex:
            raise ConfigError(
                f"model.multiplex has no entry for {name!r}, whose samples no alignment would take. Add "
                f"model.multiplex.{name}, or remove model.modalities.{name}."
            )
    for name, alignment in model.multiplex.items():
        _check_alignment(name, alignment, trainer, model)
    _check_datasets(model.multiplex, data)
    if all(0 < alignment.max_steps < trainer.max_steps for alignment in model.multiplex.values()):
        longest = max(alignment.max_steps for alignment in model.multiplex.values())
        raise ConfigError(
            f"trainer.max_steps={trainer.max_steps}, but every alignment of model.multiplex ends by step {longest}. "
            f"Set trainer.max_steps={longest}."
        )


def _check_shared(job: str, model: ModelConfig, data: DataConfig) -> None:
    """Refuse whatever the alignments would share, or get otherwise than alone."""
    if job != "pretrain":
        raise ConfigError(
            f"model.multiplex runs alignments, but job={job}, whose adapters all modalities would share. Remove it, or "
            "set job=pretrain."
        )
    if not model.language_model.freeze:
        raise ConfigError(
            "model.multiplex needs a frozen Llama, but model.language_model.freeze=false: every alignment would change "
            "the weights of the others. Set it to true, or run the alignments one by one."
        )
    if model.lora.r:
        raise ConfigError(
            f"model.multiplex needs a Llama without adapters, but model.lora.r={model.lora.r}: all alignments would "
            "train them. Set it to 0, or run the alignments one by one."
        )
    if model.discrete:
        raise ConfigError(
            "model.multiplex cannot be combined with model.discrete, whose rows of the vocabulary all alignments would "
            "share. Remove one of them."
        )
    if data.schedule:
        raise ConfigError(
            "model.multiplex cannot be combined with data.schedule: every alignment has datasets of its own from its "
            "first step to its last. Remove one of them."
        )
    if model.neftune.alpha:
        raise ConfigError(
            f"model.neftune.alpha={model.neftune.alpha} draws noise by a sample's position in the global batch, which "
            "model.multiplex changes: alignments would not train as they do alone. Set it to 0."
        )
    for key in ("fp8", "fp4"):
        if getattr(model, key):
            raise ConfigError(
                f"model.{key}={getattr(model, key)} scales by the largest value of a whole pack, so that with "
                "model.multiplex an alignment would depend on the samples of the others. Remove one of them."
            )


def _check_replaced(trainer: TrainerConfig, model: ModelConfig) -> None:
    """Refuse settings that each alignment has for itself."""
    for section, name, default in (
        ("model", "global_batch_size", ModelConfig().global_batch_size),
        ("model", "optim", ModelConfig().optim),
        ("trainer", "gradient_clip_val", TrainerConfig().gradient_clip_val),
    ):
        if getattr(model if section == "model" else trainer, name) != default:
            raise ConfigError(
                f"{section}.{name} has no effect with model.multiplex, whose alignments have their own. Remove it, and "
                f"set model.multiplex.NAME.{name}."
            )
    if trainer.gpu:
        raise ConfigError(
            f"trainer.gpu={trainer.gpu} compares the run with a plan, but a plan does not support alignments that end "
            "at different steps (model.multiplex). Remove trainer.gpu."
        )


def _check_alignment(name: str, alignment: AlignmentConfig, trainer: TrainerConfig, model: ModelConfig) -> None:
    where = f"model.multiplex.{name}"
    if name not in model.modalities:
        raise ConfigError(
            f"{where} is not one of model.modalities ({_listed(model.modalities)}).{_hint(name, model.modalities)}"
        )
    section = model.modalities[name]
    if section.projector.freeze and section.encoder.freeze:
        raise ConfigError(
            f"{where} trains nothing: model.modalities.{name}.projector.freeze and encoder.freeze are both true. Set "
            "one of them to false, or remove both sections."
        )
    if alignment.max_steps > trainer.max_steps:
        raise ConfigError(
            f"{where}.max_steps={alignment.max_steps} is more than trainer.max_steps={trainer.max_steps}. Raise that, "
            "or lower it."
        )


def _check_datasets(multiplex: Mapping[str, AlignmentConfig], data: DataConfig) -> None:
    """Refuse datasets that do not exist, or that belong to several alignments or to none."""
    owners: dict[str, str] = {}
    for name, alignment in multiplex.items():
        where = f"model.multiplex.{name}.datasets"
        if not alignment.datasets:
            raise ConfigError(f"{where} is empty. Name datasets of data.train ({_listed(data.train)}).")
        for dataset in alignment.datasets:
            if dataset not in data.train:
                raise ConfigError(
                    f"{where} names {dataset!r}, which is not in data.train ({_listed(data.train)})."
                    f"{_hint(dataset, data.train)}"
                )
            if dataset in owners:
                raise ConfigError(
                    f"{where} names {dataset!r}, which model.multiplex.{owners[dataset]}.datasets names, too. Remove "
                    "it from one of them."
                )
            owners[dataset] = name
    for split in ("train", "validation"):
        for dataset in getattr(data, split):
            if dataset not in owners:
                raise ConfigError(
                    f"data.{split}.{dataset} belongs to no alignment of model.multiplex. Add it to the datasets of one "
                    "of them, or remove it; a dataset of data.validation goes by the name of one in data.train."
                )


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else " Correct it."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
