"""Preference pairs whose packs hold the prompt once: which run does so, and where prompt and answers lie.

A span is a range of consecutive tokens in a pack. A sample has one span per document, or, if its two documents share
their prompt, three: the prompt, and the rest of each document, which continues it:

    [ prompt, media included ][ last prompt token, chosen answer ][ last prompt token, rejected answer ]

The last token of the prompt is repeated because it predicts the first token of either answer. Both answers continue the
prompt's positions, and each attends to the prompt and to itself (model/attention_kernels.py). So all log-probabilities
are those of two whole documents, up to rounding, with n + 2 (1 + a) tokens instead of 2 (n + 1 + a).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from megatron_anymal.config import ModelConfig
from megatron_anymal.data.context_parallel import padded
from megatron_anymal.data.records import PackedPrompt, PlannedMicroBatch

if TYPE_CHECKING:
    from torch import Tensor

NO_PROMPTS: Mapping[int, PackedPrompt] = MappingProxyType({})


def shares_prompts(job: str, model: ModelConfig, attention: str) -> bool:
    """Whether a run's packs hold the prompt of a pair once.

    Args:
        job: pretrain, sft or dpo.
        model: the section `model:`.
        attention: transformer_engine, flash_attn, flex or sdpa.
    """
    return job == "dpo" and not why_not_shared(model, attention)


def why_not_shared(model: ModelConfig, attention: str) -> str:
    """Why a DPO run keeps the two documents of a pair apart; "" if they share their prompt.

    Args:
        model: the section `model:`.
        attention: as in `shares_prompts`.
    """
    if model.dpo.share_prompt == "never":
        return "model.dpo.share_prompt=never"
    if attention == "transformer_engine":
        return (
            "Transformer Engine's attention cannot share a prompt between two answers; that of "
            "model.transformer_impl=local can"
        )
    if model.dpo.share_prompt == "always":
        return ""
    if model.neftune.alpha:
        return (
            "model.neftune draws separate noise for each document; with model.dpo.share_prompt=always both answers "
            "share the prompt's noise"
        )
    if model.lora.dropout:
        return (
            "model.lora.dropout draws a separate mask for each document; with model.dpo.share_prompt=always both "
            "answers share the prompt's mask"
        )
    return ""


def introduction(job: str, model: ModelConfig, attention: str) -> str:
    """The line about prompts at the start of a run; "" for jobs without pairs.

    Args:
        job: as in `shares_prompts`, like the others.
        model: the section `model:`.
        attention: attention kernel.
    """
    if job != "dpo":
        return ""
    reason = why_not_shared(model, attention)
    return (
        f"each answer of a pair computes its prompt: {reason}" if reason else "both answers of a pair share its prompt"
    )


def shared_tokens(documents: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[n]: tokens that both documents of a pair begin with, up to the token that predicts the first target; 0 without
    a second document.

    Only the answers are targets, and they end the documents. If a tokenizer merges the end of the header with an
    answer, the documents have prompts of different lengths: the shorter one counts.

    Args:
        documents: [n, 2] tokens.
        targets: [n, 2] target tokens.
    """
    prompts = (documents - targets).min(axis=1) - 1
    return np.where((documents > 0).all(axis=1), prompts.clip(min=0), 0)


def span_lengths(documents: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """[n, 3]: tokens of the shared prompt, and of each document without it.

    Args:
        documents: [n, 2] tokens; 0 if there is no second document.
        shared: [n] tokens of the shared prompt; 0 if there is none.
    """
    return np.column_stack([shared, documents - shared[:, None]])


def spans_of(plan: PlannedMicroBatch) -> list[list[slice]]:
    """Token ranges of each sample's spans within the pack, excluding padding."""
    spans, start = [], 0
    for sample in plan.samples:
        own_spans = []
        for length in sample.spans:
            own_spans.append(slice(start, start + length))
            start += padded(length, plan.document_multiple)
        spans.append(own_spans)
    return spans


def prompts_of(plan: PlannedMicroBatch) -> dict[int, PackedPrompt]:
    """The prompt that each answer without its own continues, by the number of the answer's span in the pack."""
    prompts: dict[int, PackedPrompt] = {}
    number = 0
    for sample, spans in zip(plan.samples, spans_of(plan)):
        if sample.shared:
            prompt = PackedPrompt(spans[0].start, sample.shared)
            prompts.update(dict.fromkeys(range(number + 1, number + len(spans)), prompt))
        number += len(spans)
    return prompts


def token_positions(lengths: Sequence[int], prompts: Mapping[int, PackedPrompt]) -> Tensor:
    """[T] int64: position of each token of a whole pack in its document.

    Args:
        lengths: of the pack's spans.
        prompts: see `prompts_of`.
    """
    import torch

    starts = [prompts[number].length if number in prompts else 0 for number in range(len(lengths))]
    return torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths)])


def token_lengths(plan: PlannedMicroBatch) -> Tensor:
    """[T] int64: for each token of a whole pack, the unpadded length of its document, which for a shared prompt is the
    chosen one; 0 for the padding at the end."""
    import torch

    own: list[int] = []
    in_pack: list[int] = []
    for sample in plan.samples:
        own += [*sample.documents[:1], *sample.documents] if sample.shared else sample.documents
        in_pack += [padded(length, plan.document_multiple) for length in sample.spans]
    own.append(0)
    in_pack.append(plan.padded_length - sum(in_pack))
    return torch.tensor(own).repeat_interleave(torch.tensor(in_pack))
