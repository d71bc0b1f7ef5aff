"""Samples for verifying an export: real ones of every modality, and one prompt that combines all modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from megatron_anymal.checkpoint.frozen_base import resolve_language_model
from megatron_anymal.config import DataConfig, ModelConfig
from megatron_anymal.data.chat_format import last_answer, messages_of
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.records import CodesPart, DataError, MediaPart, Part, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.generation.prompts import MediaFile, Prompt

TOGETHER = "all together"
RANDOM = "random tokens"
CODES = "random codes"
# Number of these codes.
_CODES = 32
_RANDOM_LENGTHS = (1, 7, 33, 128)


@dataclass(frozen=True)
class VerificationSample:
    """A prompt with its media, or token ids for a plain Llama."""

    # Modality, "text", TOGETHER, RANDOM or CODES.
    group: str
    key: str
    prompt: Prompt | None = None
    tokens: list[int] = field(default_factory=list)

    def to_json(self, folder: Path) -> dict[str, Any]:
        """Return the sample in the format of `anymal generate --prompts`; media are written into a new `folder`."""
        if self.prompt is None:
            return {"tokens": self.tokens}
        folder.mkdir()
        files = enumerate(self.prompt.media)

        def entry(part: Part) -> dict[str, Any]:
            if isinstance(part, TextPart):
                return {"text": part.text}
            number, file = next(files)
            path = folder / f"{number}.{file.extension}"
            path.write_bytes(file.data)
            return {"media": str(path), "modality": part.modality, **part.attributes}

        messages = messages_of(self.prompt.parts)
        if messages is None:
            return {"parts": [entry(part) for part in self.prompt.parts]}
        return {"messages": [{"role": one.role, "content": [entry(part) for part in one.content]} for one in messages]}


def choose_samples(
    model: ModelConfig, data: DataConfig, folders: Sequence[str], count: int, llama_only: bool
) -> list[VerificationSample]:
    """Choose `count` samples per modality and one with all modalities, or random tokens for a plain Llama.

    Args:
        model, data: sections of the run's configuration.
        folders: prepared folders; if empty, those of the run's validation and training sets.

    Raises:
        DataError: a modality has no sample there, or a folder is missing.
    """
    if llama_only:
        return _random_tokens(resolve_language_model(model.language_model)[1], model)
    if count < 1:
        raise DataError(f"--samples={count} must be at least 1.")
    sets = [*data.validation.values(), *data.train.values()]
    folders = list(folders) or list(dict.fromkeys(dataset.path for dataset in sets))
    kinds = [section.kind or name for name, section in model.modalities.items()]
    by_kind: dict[str, list[VerificationSample]] = {kind: [] for kind in [*kinds, "text"]}
    for folder in folders:
        _collect(folder, by_kind, count)
        if all(len(by_kind[kind]) >= count for kind in kinds):
            break
    for kind in kinds:
        if not by_kind[kind]:
            raise DataError(
                f"No sample with the modality {kind!r} to verify the export on was found in: {', '.join(folders)}. "
                "Name a prepared folder with --data, or use --no-verify."
            )
    chosen = [sample for samples in by_kind.values() for sample in samples]
    if len(kinds) > 1:
        chosen.append(_together([by_kind[kind][0] for kind in kinds]))
    if model.discrete:
        vocabulary = DiscreteVocabulary(resolve_language_model(model.language_model)[1].vocab_size, model.discrete)
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(vocabulary.base_size, vocabulary.total_size, (_CODES,), generator=generator)
        chosen.append(VerificationSample(CODES, "0", tokens=codes.tolist()))
    return chosen


def _collect(folder: str, by_kind: dict[str, list[VerificationSample]], count: int) -> None:
    try:
        index = ShardIndex(folder)
    except DataError as error:
        raise DataError(f"{error} It is needed to verify the export: name another folder with --data.") from None
    for number in range(len(index)):
        sample = index.sample(number)
        if any(isinstance(part, CodesPart) for part in sample.media):
            # Random codes are compared instead (CODES).
            continue
        # A conversation is cut before its last answer.
        parts = list(sample.documents[0] if sample.closed else last_answer(sample.documents[0])[0])
        kinds = {part.modality for part in parts if isinstance(part, MediaPart)} or {"text"}
        # A sample with several modalities counts for the one with the fewest samples so far.
        kind = min(kinds, key=lambda one: len(by_kind.get(one, ())))
        if kind not in by_kind or len(by_kind[kind]) >= count:
            if all(len(samples) >= count for samples in by_kind.values()):
                return
            continue
        media = index.read_media(number, parts, range(sum(isinstance(part, MediaPart) for part in parts)))
        prompt = Prompt(parts, [MediaFile(item.data, item.extension) for item in media])
        by_kind[kind].append(VerificationSample(kind, index.key(number), prompt))


def _together(samples: Sequence[VerificationSample]) -> VerificationSample:
    prompts = [sample.prompt for sample in samples if sample.prompt is not None]
    # Concatenate the prompts without the control tokens of conversation turns.
    parts = [part for prompt in prompts for part in prompt.parts if isinstance(part, MediaPart) or not part.control]
    media = [file for prompt in prompts for file in prompt.media]
    return VerificationSample(TOGETHER, "+".join(sample.key for sample in samples), Prompt(parts, media))


def _random_tokens(hf: LlamaConfig, model: ModelConfig) -> list[VerificationSample]:
    vocabulary = DiscreteVocabulary(hf.vocab_size, model.discrete)
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, hf.max_position_embeddings) for length in _RANDOM_LENGTHS]
    return [
        VerificationSample(
            RANDOM, str(length), tokens=torch.randint(vocabulary.total_size, (length,), generator=generator).tolist()
        )
        for length in lengths
    ]
