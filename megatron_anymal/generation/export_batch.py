"""Continuous batching for exported folders, with transformers' cache.

Rows are padded on the left, as `generate` pads them: the newest tokens of all rows are in the last column. A prompt
that joins is computed on its own and its cache is padded to the length of the others'; when rows leave, columns that
hold only padding go as well.

Shapes: R rows, L columns of the cache, g key/value groups, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_anymal.data.prompt_encoder import TokenizedPrompt
from megatron_anymal.generation.next_token import choose_each, observe_each
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.running_batch import RunningBatch, RunningPrompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.hf.inputs import batch_of

# Reads a prompt.
Read = Callable[[Prompt, Sampling], RunningPrompt]


class ExportedBatch(RunningBatch):
    """Prompts answered together by an exported model."""

    def __init__(self, model: Any, read: Read, placeholders: Sequence[int]):
        """Start an empty batch.

        Args:
            placeholders: tokens that an answer must not contain.
        """
        super().__init__()
        self._model, self._read, self._placeholders = model, read, list(placeholders)
        # A transformers.DynamicCache; None while the batch is empty.
        self._cache: Any = None

    def read(self, prompt: Prompt, sampling: Sampling) -> RunningPrompt:
        """Read a prompt and its media.

        Raises:
            DataError: a media item has no modality or cannot be read, or the prompt is too long.
        """
        return self._read(prompt, sampling)

    def _first_tokens(self, prompts: Sequence[RunningPrompt]) -> list[int]:
        read = [TokenizedPrompt(one.prompt, list(one.pieces)) for one in prompts]
        # Padding is masked; any id but a placeholder's will do.
        inputs = batch_of(read, pad=self._pad).to(self._model.device)
        mask = inputs["attention_mask"]
        output = self._model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            media=inputs["media"],
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = self._choose(prompts, output.logits)
        self._cache = output.past_key_values if self._cache is None else _joined(self._cache, output.past_key_values)
        return tokens

    def _next_tokens(self) -> list[int]:
        device = self._model.device
        lengths = torch.tensor([len(one.tokens) for one in self.running], device=device)[:, None]
        columns = self._cache.get_seq_length() + 1
        output = self._model(
            input_ids=torch.tensor([one.tokens[-1:] for one in self.running], device=device),
            # A row's tokens fill the last columns.
            attention_mask=(torch.arange(columns, device=device) >= columns - lengths).long(),
            position_ids=lengths - 1,
            past_key_values=self._cache,
            use_cache=True,
        )
        return self._choose(self.running, output.logits)

    def _keep(self, rows: Sequence[int]) -> None:
        if not rows or self._cache is None:
            self._cache = None
            return
        # The newest token of an answer is not in the cache yet.
        longest = max(len(self.running[row].tokens) for row in rows) - 1
        for layer in self._cache.layers:
            index = torch.tensor(rows, device=layer.keys.device)
            layer.keys = layer.keys[:, :, -longest:].index_select(0, index)
            layer.values = layer.values[:, :, -longest:].index_select(0, index)

    def _choose(self, prompts: Sequence[RunningPrompt], logits: Tensor) -> list[int]:
        """[R, 1, V] logits -> the next token of each prompt."""
        last = logits[:, -1].float()
        last[:, self._placeholders] = float("-inf")
        if any(one.answer.guide for one in prompts):
            observe_each(last.argmax(-1), prompts)
        return choose_each(last, prompts)

    @property
    def _pad(self) -> int:
        ends = self._model.generation_config.eos_token_id
        return ends if isinstance(ends, int) else ends[0]


def _joined(cache: Any, other: Any) -> Any:
    """Append the rows of another cache to a cache of at least one row.

    Nothing is changed until all of the new tensors exist.
    """
    length = max(cache.get_seq_length(), other.get_seq_length())

    def together(tensors: Sequence[Tensor]) -> Tensor:
        """[R, g, at most L, d] each -> [sum of R, g, L, d]."""
        return torch.cat([F.pad(one, (0, 0, length - one.size(2), 0)) for one in tensors])

    pairs = list(zip(cache.layers, other.layers))
    keys = [together([one.keys, two.keys]) for one, two in pairs]
    values = [together([one.values, two.values]) for one, two in pairs]
    for layer, key, value in zip(cache.layers, keys, values):
        layer.keys, layer.values = key, value
    return cache
