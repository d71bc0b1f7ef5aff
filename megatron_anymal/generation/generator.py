"""The common interface for generation from training checkpoints and exported folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Optional

from megatron_anymal.config import ConfigError
from megatron_anymal.data.records import DataError
from megatron_anymal.generation.answers import Answer
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.telemetry import Progress

# Called with an answer after each of its tokens.
Watch = Callable[[Answer], None]


class PromptTooLong(DataError):
    """A prompt that leaves no room for an answer."""


class Generator(ABC):
    """A model that answers prompts."""

    # Whether this process prints and writes.
    reports: bool = True
    # Kinds of media that the model supports.
    kinds: Collection[str]
    # Most tokens that a prompt and its answer may have together; None: no limit.
    max_positions: Optional[int] = None

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int = 64, watch: Optional[Watch] = None
    ) -> list[str]:
        """Answer every prompt. Collective if the model is split over several processes; each gets all answers.

        Raises:
            ConfigError: `batch_size` is below 1.
            DataError, MediaError: a media item has no modality or cannot be read, or a prompt is too long.
        """
        return [answer for batch in self.batches(prompts, sampling, batch_size, watch) for answer in batch]

    def batches(
        self, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int = 64, watch: Optional[Watch] = None
    ) -> Iterator[list[str]]:
        """Like `answer`, but yield `batch_size` answers at a time.

        Raises:
            ConfigError: `batch_size` is below 1.
            DataError, MediaError: as in `answer`.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1.")
        progress = Progress("answering", len(prompts)) if self.reports and len(prompts) > batch_size else None
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            yield self._answer(batch, start, sampling, watch or _nobody)
            if progress:
                progress.advance(len(batch))
        if progress:
            progress.finish()

    @abstractmethod
    def _answer(self, prompts: Sequence[Prompt], first: int, sampling: Sampling, watch: Watch) -> list[str]:
        """Answer one batch; `first` is the number of its first prompt."""

    def _room(self, number: int, length: int, sampling: Sampling) -> int:
        """Largest number of tokens in the answer to a prompt of `length` tokens."""
        if self.max_positions is None:
            return sampling.max_new_tokens
        if length >= self.max_positions:
            raise PromptTooLong(
                f"Prompt {number} has {length} tokens, including its media, but the model has {self.max_positions} "
                "positions for a prompt and its answer. Shorten it."
            )
        return min(sampling.max_new_tokens, self.max_positions - length)


def _nobody(answer: Answer) -> None:
    """Ignore the answer."""
