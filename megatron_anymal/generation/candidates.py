"""Prompts with candidate answers as one micro-batch, for the candidates' likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_anymal.data.micro_batch import MediaBatch, MicroBatch, positions_with_label
from megatron_anymal.data.tokenizer import Document

# The documents of a prompt, one per candidate, and the prompt's pieces by modality, in order.
Asked = tuple[Sequence[Document], Sequence[tuple[str, Tensor]]]


def candidate_batch(
    asked: Sequence[Asked], placeholders: Mapping[str, int], padding: int, length_multiple: int
) -> MicroBatch:
    """Concatenate documents whose answers' tokens are the labels. The media of a prompt are encoded once.

    Args:
        asked: as of `PromptReader.read_answered`.
        placeholders: modality -> placeholder id.
        padding: token of the document that fills up to a multiple of `length_multiple` tokens.
    """
    documents = [document for several, _ in asked for document in several]
    tokens = [document.tokens for document in documents]
    if missing := -sum(map(len, tokens)) % length_multiple:
        tokens = [*tokens, [padding] * missing]
    media = {name: batch for name, token in placeholders.items() if (batch := _media(asked, name, token))}
    plain = MicroBatch.unlabelled(tokens, media)
    labels, mask = torch.zeros_like(plain.labels), torch.zeros_like(plain.loss_mask)
    start = 0
    for document in documents:
        end = start + len(document.tokens) - 1
        labels[0, start:end] = torch.tensor(document.tokens[1:])
        mask[0, start:end] = torch.tensor(document.is_target[1:], dtype=mask.dtype)
        start = end + 1
    return replace(plain, labels=labels, loss_mask=mask, label_index=positions_with_label(mask))


def _media(asked: Sequence[Asked], name: str, placeholder: int) -> MediaBatch | None:
    """Pieces of a modality, and for each of its placeholders its soft token; None if there are none."""
    pieces, positions, soft = [], [], []
    start = first = 0
    for documents, items in asked:
        pieces += [tensor for modality, tensor in items if modality == name]
        count = 0
        for document in documents:
            own = (torch.tensor(document.tokens) == placeholder).nonzero().flatten()
            positions.append(own + start)
            soft.append(torch.arange(len(own)) + first)
            start, count = start + len(document.tokens), len(own)
        first += count
    if not pieces:
        return None
    together = torch.cat(pieces)
    return MediaBatch(together, ((len(together),),), torch.cat(positions), torch.cat(soft))
