"""What an export is verified on: real samples of every modality, and one prompt with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from megatron_anymal.checkpoint.frozen_base import resolve_language_model
from megatron_anymal.config import RunConfig
from megatron_anymal.data.chat_format import last_answer, messages_of
from megatron_anymal.data.records import DataError, MediaPart, Part, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.generation.prompts import MediaFile, Prompt

TOGETHER = "all together"
RANDOM = "random tokens"
_RANDOM_LENGTHS = (1, 7, 33, 128)


@dataclass(frozen=True)
class VerificationSample:
    """A prompt with its media, or for a Llama alone token ids."""

    # Modality, "text", TOGETHER or RANDOM.
    group: str
    key: str
    prompt: Prompt | None = None
    tokens: list[int] = field(default_factory=list)

    def to_json(self, folder: Path) -> dict[str, Any]:
        """As `anymal generate --prompts` takes it; media are written into `folder`, a new one."""
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


def choose_samples(config: RunConfig, data: Sequence[str], count: int, llama_only: bool) -> list[VerificationSample]:
    """`count` samples of every modality from prepared folders, one with all modalities, and of a Llama random tokens.

    Args:
        data: the folders; empty takes the run's validation sets and training sets.

    Raises:
        DataError: a modality has no sample there, or there is no folder.
    """
    if llama_only:
        return _random_tokens(resolve_language_model(config)[1])
    if count < 1:
        raise DataError(f"--samples={count} must be at least 1.")
    sets = [*config.data.validation.values(), *config.data.train.values()]
    folders = list(data) or list(dict.fromkeys(dataset.path for dataset in sets))
    kinds = [section.kind or name for name, section in config.model.modalities.items()]
    found: dict[str, list[VerificationSample]] = {kind: [] for kind in [*kinds, "text"]}
    for folder in folders:
        _collect(folder, found, count)
        if all(len(found[kind]) >= count for kind in kinds):
            break
    for kind in kinds:
        if not found[kind]:
            raise DataError(
                f"There is no sample with the modality {kind!r} to verify the export on, in: {', '.join(folders)}. "
                "Name a prepared folder with --data, or give --no-verify."
            )
    chosen = [sample for samples in found.values() for sample in samples]
    if len(kinds) > 1:
        chosen.append(_together([found[kind][0] for kind in kinds]))
    return chosen


def _collect(folder: str, found: dict[str, list[VerificationSample]], count: int) -> None:
    try:
        index = ShardIndex(folder)
    except DataError as error:
        raise DataError(f"{error} It is wanted to verify the export: name another folder with --data.") from None
    for number in range(len(index)):
        sample = index.sample(number)
        # A conversation as it is asked: up to its last answer.
        parts = list(sample.documents[0] if sample.closed else last_answer(sample.documents[0])[0])
        kinds = {part.modality for part in parts if isinstance(part, MediaPart)} or {"text"}
        # Of a sample with several modalities the rarest counts.
        kind = min(kinds, key=lambda one: len(found.get(one, ())))
        if kind not in found or len(found[kind]) >= count:
            if all(len(samples) >= count for samples in found.values()):
                return
            continue
        media = index.read_media(number, parts, range(sum(isinstance(part, MediaPart) for part in parts)))
        prompt = Prompt(parts, [MediaFile(item.data, item.extension) for item in media])
        found[kind].append(VerificationSample(kind, index.key(number), prompt))


def _together(samples: Sequence[VerificationSample]) -> VerificationSample:
    prompts = [sample.prompt for sample in samples if sample.prompt is not None]
    # One after the other, without the turns of conversations.
    parts = [part for prompt in prompts for part in prompt.parts if isinstance(part, MediaPart) or not part.control]
    media = [file for prompt in prompts for file in prompt.media]
    return VerificationSample(TOGETHER, "+".join(sample.key for sample in samples), Prompt(parts, media))


def _random_tokens(hf: LlamaConfig) -> list[VerificationSample]:
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, hf.max_position_embeddings) for length in _RANDOM_LENGTHS]
    return [
        VerificationSample(
            RANDOM, str(length), tokens=torch.randint(hf.vocab_size, (length,), generator=generator).tolist()
        )
        for length in lengths
    ]
