"""Continuous batching for training checkpoints, with the key-value cache of model/key_value_cache.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.running_batch import RunningBatch, RunningPrompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.model.key_value_cache import KeyValueCache


class CheckpointBatch(RunningBatch):
    """Prompts answered together by a model of this trainer, in one process."""

    def __init__(
        self,
        read: Callable[[Prompt, Sampling], RunningPrompt],
        compute: Callable[[Sequence[RunningPrompt], KeyValueCache], list[int]],
    ):
        """Start an empty batch.

        Args:
            read: reads a prompt.
            compute: gives prompts their next tokens and adds to their cache.
        """
        super().__init__()
        self._read, self._compute, self._cache = read, compute, KeyValueCache(0)

    def read(self, prompt: Prompt, sampling: Sampling) -> RunningPrompt:
        """Read a prompt and its media.

        Raises:
            DataError, MediaError: a media item has no modality or cannot be read, or the prompt is too long.
        """
        return self._read(prompt, sampling)

    def _first_tokens(self, prompts: Sequence[RunningPrompt]) -> list[int]:
        cache = KeyValueCache(len(prompts))
        tokens = self._compute(prompts, cache)
        self._cache.append(cache)
        return tokens

    def _next_tokens(self) -> list[int]:
        return self._compute(self.running, self._cache)

    def _keep(self, rows: Sequence[int]) -> None:
        self._cache.keep(rows)
