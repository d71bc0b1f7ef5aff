"""Validation of `model.discrete`: media as codes of the Llama's vocabulary."""

from __future__ import annotations

import re

from megatron_anymal.config.model_section import DiscreteConfig, ModelConfig
from megatron_anymal.config.schema import ConfigError

# The written form of codes (DiscreteVocabulary.text).
_CODE = re.compile(r"<([^:]*):[0-9]+:[0-9]+>")
INTERLEAVINGS = ("sequential", "alternating")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def check_discrete(job: str, model: ModelConfig) -> None:
    """Reject sections of `model.discrete`, and related keys, that cannot work.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    if not model.discrete:
        for key, default in (("discrete_init", "statistics"), ("discrete_rows", "new")):
            if getattr(model, key) != default:
                raise ConfigError(f"model.{key}={getattr(model, key)} has no effect without model.discrete. Remove it.")
        return
    _check_rows(job, model)
    marks: dict[str, str] = {}
    for name, section in model.discrete.items():
        _check_section(model, name, section)
        for key, mark in (("begin", section.begin or f"<{name}>"), ("end", section.end or f"</{name}>")):
            where = f"model.discrete.{name}.{key}"
            if mark in marks:
                raise ConfigError(f"{where}={mark!r} is also {marks[mark]}. Each mark must be a token of its own.")
            marks[mark] = where
    for name, modality in model.modalities.items():
        if modality.placeholder in marks:
            raise ConfigError(
                f"{marks[modality.placeholder]}={modality.placeholder!r} is also model.modalities.{name}.placeholder. "
                "Change one of them."
            )


def _check_rows(job: str, model: ModelConfig) -> None:
    rows = model.discrete_rows
    if rows == "all" and model.language_model.freeze:
        raise ConfigError(
            "model.discrete_rows=all also trains the Llama's own rows of the embedding and the head, but "
            "model.language_model.freeze=true keeps them fixed. Set model.discrete_rows=new, or train the whole Llama."
        )
    if rows == "none" and not model.restore_from_path:
        raise ConfigError(
            "model.discrete_rows=none would leave the rows of marks and codes at their first, random values. Set "
            "model.restore_from_path to a run that trained them, or model.discrete_rows=new."
        )
    if job == "dpo" and rows != "none":
        raise ConfigError(
            f"The job dpo trains the adapters only, so that its reference has the same embedding and head: "
            f"model.discrete_rows={rows} would train them. Set model.discrete_rows=none."
        )
    for key in ("fp8", "fp4"):
        if getattr(model, key):
            raise ConfigError(
                f"model.{key}={getattr(model, key)} has not been tested with model.discrete. Set model.{key}='', or "
                "remove model.discrete."
            )


def _check_section(model: ModelConfig, name: str, section: DiscreteConfig) -> None:
    where = f"model.discrete.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: names consist of letters, digits, - and _, and begin with a letter.")
    if name == "text" or name in model.modalities:
        other = f"model.modalities.{name}" if name in model.modalities else "the metrics of text"
        raise ConfigError(f"{where} has the name of {other}. Choose another, for example {name}_codes.")
    if not section.codebooks:
        raise ConfigError(f"{where}.codebooks is empty. List the number of codes of each codebook, such as [8192].")
    for index, size in enumerate(section.codebooks):
        if size < 1:
            raise ConfigError(f"{where}.codebooks[{index}]={size} must be at least 1.")
    books, codes = len(section.codebooks), section.codes_per_item
    if codes < 0 or codes % books:
        raise ConfigError(
            f"{where}.codes_per_item={codes} must be 0 or a multiple of the {books} codebook(s), because an item has "
            "as many codes of each."
        )
    if not 0 <= section.prompt_codebooks <= books and section.prompt_codebooks != 1:
        raise ConfigError(
            f"{where}.prompt_codebooks={section.prompt_codebooks} must be at most the {books} codebook(s) of "
            f"{where}.codebooks, or 0 for all."
        )
    if section.interleaving not in INTERLEAVINGS:
        raise ConfigError(f"{where}.interleaving={section.interleaving!r} must be one of {', '.join(INTERLEAVINGS)}.")
    for key in ("begin", "end"):
        mark = getattr(section, key)
        if mark and mark.strip() != mark:
            raise ConfigError(f"{where}.{key}={mark!r} begins or ends with a space. Remove it.")
        if code := _CODE.fullmatch(mark):
            raise ConfigError(f"{where}.{key}={mark!r} is a code of {code[1]!r} in written form. Choose another mark.")
