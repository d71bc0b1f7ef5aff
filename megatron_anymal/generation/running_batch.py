"""Continuous batching: prompts join and leave a batch between steps, and each keeps its own sampling settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_anymal.generation.answers import Answer
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling


@dataclass(eq=False)
class RunningPrompt:
    """A prompt being answered."""

    # Token ids, with one placeholder id per soft token.
    prompt: list[int]
    # Name of the modality and encoder input [pieces, *piece_shape] of each media item.
    pieces: Sequence[tuple[str, Tensor]]
    # The answer so far.
    answer: Answer
    # Settings of this answer.
    sampling: Sampling

    @property
    def tokens(self) -> list[int]:
        """Token ids of the prompt and the answer so far."""
        return self.prompt + self.answer.tokens

    @property
    def longest(self) -> int:
        """Maximum number of tokens in the prompt and its answer together."""
        return len(self.prompt) + self.answer.room


class RunningBatch(ABC):
    """Prompts that are answered together in one process, one token each per step.

    An answer does not depend on the other prompts, apart from the rounding of sums in another order. Except for `read`,
    all methods are for one thread.

    Attributes:
        running: the prompts in the batch.
    """

    def __init__(self) -> None:
        self.running: list[RunningPrompt] = []

    @abstractmethod
    def read(self, prompt: Prompt, sampling: Sampling) -> RunningPrompt:
        """Read a prompt and its media, on any thread.

        Raises:
            DataError, MediaError: a media item has no modality or cannot be read, or the prompt is too long.
        """

    @torch.no_grad()
    def join(self, prompts: Sequence[RunningPrompt]) -> None:
        """Add prompts: computes them in one pass and gives each its first token. The others are not affected, even if
        this fails."""
        tokens = self._first_tokens(prompts)
        self.running += prompts
        for one, token in zip(prompts, tokens):
            one.answer.add(token)

    @torch.no_grad()
    def step(self) -> None:
        """Give every answer its next token."""
        for one, token in zip(self.running, self._next_tokens()):
            one.answer.add(token)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all prompts except those with these numbers, which keep their order."""
        self._keep(rows)
        self.running = [self.running[row] for row in rows]

    @abstractmethod
    def _first_tokens(self, prompts: Sequence[RunningPrompt]) -> list[int]:
        """Compute new prompts and add them to the cache, behind the others."""

    @abstractmethod
    def _next_tokens(self) -> list[int]:
        """Compute the newest token of each running answer."""

    @abstractmethod
    def _keep(self, rows: Sequence[int]) -> None:
        """Drop the other rows from the cache."""
