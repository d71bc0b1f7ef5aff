"""Files of an export other than weights: configuration, code, processor, tokenizer and generation settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig

from checkpoint_tools.exporting.chat_template import chat_template
from checkpoint_tools.exporting.discrete_tokens import with_discrete_tokens
from checkpoint_tools.exporting.weights import Entries
from megatron_anymal.config import ModelConfig
from megatron_anymal.data.chat_format import CHAT_TOKENS, END_TURN
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.records import DataError
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.hf.configuration_anymal import AnyMALConfig
from megatron_anymal.hf.modality_configs import export_discrete, export_sections
from megatron_anymal.hf.remote_code import ARCHITECTURE, CONFIG_AUTO_MAP, PROCESSOR_AUTO_MAP, write_code

# Takes precedence over a template in tokenizer_config.json.
_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_SETTINGS = "tokenizer_config.json"


def write_model_files(
    folder: Path, model: ModelConfig, tokenizer_folder: str, hf: LlamaConfig, entries: Entries
) -> None:
    """Write all files of an AnyMALForConditionalGeneration except weights and model card.

    Args:
        folder: the export.
        model: `model` of the run's configuration.
        tokenizer_folder: `data.tokenizer` of the run.
        hf: of the exported Llama, with marks and codes.

    Raises:
        ConfigError, DataError: the tokenizer or an encoder's folder is missing or differs from the run's.
    """
    tokenizer = Tokenizer(tokenizer_folder)
    sections = export_sections(model.modalities, tokenizer)
    ends = _ends(tokenizer)
    added = DiscreteVocabulary(0, model.discrete).added
    vocabulary = DiscreteVocabulary(hf.vocab_size - added, model.discrete)
    discrete = export_discrete(vocabulary.base_size, model.discrete)
    exported = AnyMALConfig(
        text_config=hf.to_dict(), modalities=sections, discrete=discrete, **_tokens(tokenizer, ends)
    )
    exported.auto_map, exported.architectures = dict(CONFIG_AUTO_MAP), [ARCHITECTURE]
    exported.dtype = _main_type(entries)
    plugins = [Path(path) for path in model.plugins]
    if plugins:
        exported.plugins = [path.name for path in plugins]
    exported.save_pretrained(folder)
    write_code(folder, plugins)
    processor = {"processor_class": "AnyMALProcessor", "auto_map": dict(PROCESSOR_AUTO_MAP), "modalities": sections}
    processor |= {"discrete": discrete} if discrete else {}
    _write_json(folder / "processor_config.json", processor)
    placeholders = {section["kind"]: section["placeholder"] for section in sections.values()}
    _write_tokenizer(folder, tokenizer, placeholders, vocabulary)
    hidden = sorted(section["placeholder_id"] for section in sections.values())
    _write_generation_config(folder, tokenizer, ends, hidden)


def write_llama_files(
    folder: Path, tokenizer_folder: str, hf: LlamaConfig, vocabulary: DiscreteVocabulary, entries: Entries
) -> None:
    """Write all files of a LlamaForCausalLM except weights and model card; no tokenizer if the run's is missing.

    Args:
        folder: the export.
        tokenizer_folder: `data.tokenizer` of the run; "" if it had none.
        hf: of the exported Llama, with marks and codes.
        vocabulary: the marks and codes.
    """
    # AnyMALConfig writes a form that both transformers 4 and 5 read.
    exported: dict[str, Any] = AnyMALConfig(text_config=hf.to_dict()).to_dict()["text_config"]
    exported |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": _main_type(entries)}
    _write_json(folder / "config.json", exported)
    tokenizer = _of_run(tokenizer_folder)
    if tokenizer is None:
        GenerationConfig(bos_token_id=hf.bos_token_id, eos_token_id=hf.eos_token_id).save_pretrained(folder)
        return
    _write_tokenizer(folder, tokenizer, {}, vocabulary)
    _write_generation_config(folder, tokenizer, _ends(tokenizer), [])


def _of_run(folder: str) -> Tokenizer | None:
    """Return the run's tokenizer, or print why it cannot be used and return None."""
    if not folder:
        print("left out: a tokenizer; the checkpoint's run or import had none")
        return None
    try:
        return Tokenizer(folder)
    except DataError as error:
        print(f"left out: the tokenizer: {error}")
        return None


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer, placeholders: dict[str, str], vocabulary: DiscreteVocabulary
) -> None:
    """Write the tokenizer as it was loaded, with the chat template of training if it has the format's tokens, and with
    marks and codes."""
    with_discrete_tokens(tokenizer, vocabulary).save_pretrained(folder)
    settings = json.loads((folder / TOKENIZER_SETTINGS).read_text(encoding="utf-8"))
    _write_json(folder / TOKENIZER_SETTINGS, _of_both_versions(settings))
    if set(CHAT_TOKENS) <= tokenizer.control.keys():
        template = chat_template(placeholders, tokenizer.control)
        (folder / _TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _of_both_versions(settings: dict[str, Any]) -> dict[str, Any]:
    """Rename a tokenizer's settings to transformers 4's names, which transformers 5 also reads."""
    settings = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def _write_generation_config(folder: Path, tokenizer: Tokenizer, ends: list[int], hidden: Iterable[int]) -> None:
    """Write greedy settings that suppress placeholder tokens: they represent media and never belong in an answer."""
    GenerationConfig(
        **_tokens(tokenizer, ends), max_new_tokens=64, do_sample=False, suppress_tokens=list(hidden) or None
    ).save_pretrained(folder)


def _ends(tokenizer: Tokenizer) -> list[int]:
    return sorted({tokenizer.end, tokenizer.hf.get_vocab().get(END_TURN, tokenizer.end)})


def _tokens(tokenizer: Tokenizer, ends: list[int]) -> dict[str, Any]:
    pad = tokenizer.hf.pad_token_id
    return {
        "bos_token_id": tokenizer.begin,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.end if pad is None else pad,
    }


def _main_type(entries: Entries) -> str:
    """Most common floating-point dtype of the tensors."""
    [(dtype, _)] = Counter(dtype for dtype, _ in entries.values() if dtype.is_floating_point).most_common(1)
    return str(dtype).removeprefix(f"{torch.__name__}.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
