"""An AnyMAL model as a classifier of answers together with the media that they are about."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.config import ConfigError
from megatron_anymal.data.chat_format import Message, open_prompt
from megatron_anymal.data.records import MediaPart, Part, TextPart
from megatron_anymal.generation.generator import Generator
from megatron_anymal.generation.model_folder import exported_config
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.integrity.config import PairClassifier


class PairScorer:
    """A loaded AnyMAL model that answers with one of two words, whichever is likelier."""

    def __init__(self, config: PairClassifier, where: str):
        """Load the model.

        Args:
            where: the classifier's section, for messages.

        Raises:
            ConfigError: it cannot be loaded, or is a checkpoint and several processes were started.
            DataError: its tokenizer cannot be used.
        """
        self._config, self._generator = config, _load(config, where)

    @property
    def kinds(self) -> Collection[str]:
        """Kinds of media that the model takes."""
        return self._generator.kinds

    def scores(self, inputs: Sequence[tuple[Prompt, str]]) -> list[Mapping[str, float]]:
        """Probability of the first word, given that it is one of both.

        Args:
            inputs: prompts with media of the model's kinds, and an answer to each, which may be incomplete.
        """
        config = self._config
        prompts = [self._question(prompt, answer) for prompt, answer in inputs]
        pairs = self._generator.log_likelihoods(prompts, [config.words] * len(prompts), config.batch_size)
        return [{config.words[0]: _sigmoid(first - second)} for first, second in pairs]

    def _question(self, prompt: Prompt, answer: str) -> Prompt:
        media = [part for part in prompt.parts if isinstance(part, MediaPart)]
        parts: list[Part] = [*media, TextPart(self._config.question.replace("{answer}", answer))]
        return Prompt(open_prompt([Message("user", tuple(parts))]) if self._config.chat else parts, prompt.media)


def _sigmoid(difference: float) -> float:
    """1 / (1 + exp(-difference)); NaN stays NaN."""
    return 1 / (1 + math.exp(max(-700.0, min(700.0, -difference)))) if difference == difference else difference


def _load(config: PairClassifier, where: str) -> Generator:
    try:
        exported = exported_config(Path(config.path))
        if exported is not None:
            from megatron_anymal.generation.export_generator import ExportedGenerator

            device = config.device or None
            return ExportedGenerator.of_folder(config.path, exported, device, "auto", trust_remote_code=False)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"{config.path!r} is a training checkpoint, which several processes would split among themselves. "
                "Export it with checkpoint_tools.export_hf, and name the export."
            )
        from megatron_anymal.generation.checkpoint_generator import NativeGenerator

        return NativeGenerator.of_run(config.path)
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"{where}.path: {error}") from error
