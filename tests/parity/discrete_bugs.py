"""Planted bugs of discrete media; see planted.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

import megatron_anymal.model.anymal as anymal
import megatron_anymal.model.build as model_build
import megatron_anymal.model.lm_head as head
import megatron_anymal.train.build as train_build
from parity.discrete import DISCRETE
from parity.planted import Bug, wrap

_TEXT = DISCRETE[0]


def _ids_shifted() -> None:
    def shifted(original: Any, gpt: Any, discrete: Any, tokens: Any, vocab_size: int) -> Any:
        return original(gpt, discrete, torch.where(tokens > vocab_size, tokens - 1, tokens), vocab_size)

    wrap(anymal, "embed_tokens", shifted)


def _rows_swapped_between_ranks() -> None:
    def swapped(original: Any, models: Any, *args: Any) -> None:
        original(models, *args)
        group: Any = parallel_state.get_tensor_model_parallel_group()
        for weight in (weight.data for model in models for weight in model.discrete.parameters()):
            shards = [torch.empty_like(weight) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, weight, group=group)
            weight.copy_(shards[dist.get_rank(group) - 1])

    wrap(model_build, "initialise_rows", swapped)


def _tied_rows_not_added_up() -> None:
    train_build.add_tied_gradients = lambda models: None


def _labels_found_in_padding() -> None:
    def without_ends(original: Any, labels: Any, extents: Any) -> Any:
        return original(labels, [replace(extent, size=extent.size + 1) for extent in extents])

    wrap(head, "_own_labels", without_ends)


DISCRETE_BUGS = (
    Bug("ids of codes shifted by one in the embedding", _ids_shifted, _TEXT),
    Bug("codes' rows swapped between tensor ranks", _rows_swapped_between_ranks, replace(_TEXT, tensor=2)),
    Bug(
        "tied rows' gradients not added up over stages",
        _tied_rows_not_added_up,
        replace(_TEXT, pipeline=2, tied_head=True),
    ),
    Bug("a code's label found in the padding of the text's rows", _labels_found_in_padding, replace(_TEXT, tensor=2)),
)
