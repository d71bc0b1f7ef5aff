"""Planted bugs: the worst silent failures of distributed training, switched on one at a time. The suite must catch all.

`Bug.plant` is called on every rank before the model is built, and patches the program in that process.

Positions that continue across a document boundary are not included: rotary embeddings depend only on the distance
between two tokens, so this changes nothing but rounding.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from megatron.core import parallel_state

import megatron_anymal.data.loader as loader
import megatron_anymal.model.anymal as anymal
import megatron_anymal.model.attention as attention
import megatron_anymal.model.build as model_build
import megatron_anymal.model.encoder_sharding as shares
import megatron_anymal.model.llama as llama
import megatron_anymal.model.lm_head as head
import megatron_anymal.model.lora as lora
import megatron_anymal.train.build as train_build
import megatron_anymal.train.objective as objective
import megatron_anymal.train.restore as train_restore
from megatron_anymal.model.attention import rotation
from parity.layouts import Layout


@dataclass(frozen=True)
class Bug:
    """A planted bug, and a layout in which it has an effect."""

    what: str
    plant: Callable[[], None]
    layout: Layout


def _wrap(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace `owner.name` with `change`, which gets the original as its first argument."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def _stage_without_document_lengths() -> None:
    def one_document(original: Any, lengths: Any, *args: Any) -> Any:
        whole = lengths if parallel_state.is_pipeline_first_stage() else (sum(lengths),)
        return original(whole, *args)

    _wrap(anymal, "document_pack", one_document)


def _features_swapped() -> None:
    def swapped(original: Any, mine: Any, parts: Any) -> Any:
        features = original(mine, parts)
        return features.flip(0) if parallel_state.get_tensor_model_parallel_rank() == 1 else features

    _wrap(anymal, "gather_features", swapped)


def _soft_tokens_shifted() -> None:
    def shifted(original: Any, mine: Any, parts: Any) -> Any:
        return original(mine, parts).roll(1, 0)

    _wrap(anymal, "gather_soft_tokens", shifted)


def _sequence_parallel_reduce_missing() -> None:
    def unmarked(original: Any, self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        self.weight.sequence_parallel = False

    _wrap(llama.RMSNorm, "__init__", unmarked)


def _context_gradient_doubled() -> None:
    def doubled(original: Any, key: Any, value: Any, places: Any) -> Any:
        # Twice the gradient, the same value.
        return original(*(2 * x - x.detach() for x in (key, value)), places)

    _wrap(attention, "_gather_keys", doubled)


def _context_gradient_kept_apart() -> None:
    def apart(mine: Any, parts: Any) -> Any:
        with torch.no_grad():
            everything = shares.gather_soft_tokens(mine, parts).clone()
        # Each rank keeps only the gradient that its own tokens give to its own soft tokens.
        first = sum(parts[: parallel_state.get_context_parallel_rank()])
        return torch.cat([everything[:first], mine, everything[first + len(mine) :]])

    anymal.gather_soft_tokens = apart


def _mask_leaks_over_a_border() -> None:
    def leaking(original: Any, lengths: Any, *args: Any) -> Any:
        pack = original(lengths, *args)
        if len(lengths) > 1:
            joined = original((lengths[0] + lengths[1], *lengths[2:]), *args)
            pack.kernel = joined.kernel
        return pack

    _wrap(anymal, "document_pack", leaking)


def _positions_in_the_order_of_one_rank() -> None:
    def contiguous(original: Any, lengths: Any, *args: Any) -> Any:
        pack = original(lengths, *args)
        own, rank = len(pack.rotation.cos), parallel_state.get_context_parallel_rank()
        places = torch.cat([torch.arange(length) for length in lengths])
        pack.rotation = rotation(places[rank * own : (rank + 1) * own], args[1])
        return pack

    _wrap(anymal, "document_pack", contiguous)


def _head_gradient_not_summed() -> None:
    head.copy_to_tensor_model_parallel_region = lambda rows: rows


def _backward_skipped_with_media() -> None:
    anymal.AnyMALModel._has_gradient = lambda self, micro_batch: False  # type: ignore[method-assign]


def _mean_over_ranks() -> None:
    def of_own_tokens(original: Any, losses: Any, mask: Any, targets: int) -> Any:
        own = int(mask.sum()) * parallel_state.get_data_parallel_world_size()
        return original(losses, mask, own)

    _wrap(objective, "batch_mean", of_own_tokens)


def _projector_gradient_lost_on_text() -> None:
    def forward(original: Any, self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and not micro_batch.media:
            parameter: Any
            for parameter in self.projectors.parameters():
                # The zero gradient of a text-only micro-batch replaces the sum instead of being added to it.
                parameter.main_grad.zero_()
        return original(self, micro_batch, *args, **kwargs)

    _wrap(anymal.AnyMALModel, "forward", forward)


def _frozen_llama_passes_no_gradient() -> None:
    def cut(original: Any, text: Any, soft: Any, places: Any) -> Any:
        return original(text, soft, places).detach()

    _wrap(anymal, "merge", cut)


def _trainable_encoder_not_summed() -> None:
    model_build.share_gradients = lambda encoder: None


def _first_micro_batch_lost() -> None:
    steps: set[int] = set()

    def forward(original: Any, self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, micro_batch, *args, **kwargs)
        if micro_batch.plan.step in steps:
            return output
        steps.add(micro_batch.plan.step)
        return output.detach().requires_grad_()

    _wrap(anymal.AnyMALModel, "forward", forward)


def _last_micro_batch_alone() -> None:
    before: dict[int, tuple[int, ...]] = {}

    def forward(original: Any, self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, micro_batch, *args, **kwargs)
        if parallel_state.get_pipeline_model_parallel_world_size() == 1 or not output.requires_grad:
            return output

        def overwrite(gradient: Any) -> None:
            # Runs first in a stage's backward pass of this micro-batch, before any weight gradient is added.
            if before.get(id(self)) != micro_batch.document_lengths:
                parameter: Any
                for parameter in self.parameters():
                    if parameter.requires_grad:
                        parameter.main_grad.zero_()
            before[id(self)] = micro_batch.document_lengths

        output.register_hook(overwrite)
        return output

    _wrap(anymal.AnyMALModel, "forward", forward)


def _recomputed_layers_without_gradient() -> None:
    def embed(original: Any, self: Any, *args: Any) -> Any:
        # Nothing before the Llama trains in this layout: its input has a gradient only because the model requests one.
        return original(self, *args).detach()

    _wrap(anymal.AnyMALModel, "embed", embed)


def _tied_head_apart() -> None:
    # In the package, the function of the same name hides this module.
    finalize: Any = sys.modules["megatron.core.distributed.finalize_model_grads"]
    finalize._allreduce_word_embedding_grads = lambda *args, **kwargs: None


def _virtual_parts_in_the_wrong_order() -> None:
    def swapped(original: Any, *args: Any) -> Any:
        parts = original(*args)
        if len(parts) > 1 and parallel_state.get_pipeline_model_parallel_rank() == 0:
            first, last = (part.language_model.decoder.layers for part in parts[:2])
            parts[0].language_model.decoder.layers, parts[1].language_model.decoder.layers = last, first
        return parts

    _wrap(train_build, "build_models", swapped)


def _labels_of_the_whole_pack() -> None:
    def unsplit(original: Any, self: Any, micro_batch: Any) -> Any:
        mine = original(self, micro_batch)
        own = mine.labels.size(1)
        return dataclasses.replace(mine, labels=micro_batch.labels[:, :own])

    _wrap(loader.MicroBatchReader, "_own_part", unsplit)


def _noise_by_place_in_the_pack() -> None:
    def in_pack(original: Any, micro_batch: Any) -> Any:
        documents, positions = original(micro_batch)
        return documents.clamp(max=0), torch.arange(len(positions))

    _wrap(anymal, "_name_tokens", in_pack)


def _adapters_sequence_parallel_reduce_missing() -> None:
    def unmarked(original: Any, self: Any, *args: Any) -> None:
        original(self, *args)
        self.A.sequence_parallel = False

    _wrap(lora._Projection, "__init__", unmarked)


def _reference_without_adapters() -> None:
    def of_the_base(original: Any, models: Any) -> None:
        original(models)
        for projection in lora._projections(models):
            a, b = projection.kept
            projection.kept = a, torch.zeros_like(b)

    _wrap(train_restore, "keep_reference", of_the_base)


def _pairs_counted_once_per_context_rank() -> None:
    def summed(parts: Any, group: Any) -> Any:
        # The backward pass of this all-reduce sums again.
        return dist.nn.functional.all_reduce(parts.contiguous(), group=group)

    objective.sum_over_context = summed


def _answers_exchanged_on_one_rank() -> None:
    def exchanged(original: Any, self: Any, micro_batch: Any) -> Any:
        mine = original(self, micro_batch)
        if parallel_state.get_context_parallel_rank() == 0:
            return mine
        return dataclasses.replace(mine, branch=torch.where(mine.branch < 0, -1, 1 - mine.branch))

    _wrap(loader.MicroBatchReader, "_own_part", exchanged)


_SFT = Layout(job="sft", trains="lora", noise="all")
_DPO_CP2 = Layout(job="dpo", trains="lora", noise="all", context=2)

BUGS = (
    Bug("later pipeline stages treat a pack as one document", _stage_without_document_lengths, Layout(pipeline=2)),
    Bug("attention crosses a document boundary", _mask_leaks_over_a_border, Layout()),
    Bug(
        "encoder features in the wrong order on one tensor-parallel rank",
        _features_swapped,
        Layout(tensor=2, media="image"),
    ),
    Bug(
        "soft tokens shifted by one image tile under context parallelism",
        _soft_tokens_shifted,
        Layout(context=2, media="image"),
    ),
    Bug(
        "contiguous instead of zig-zag positions under context parallelism",
        _positions_in_the_order_of_one_rank,
        Layout(context=2),
    ),
    Bug("labels not split across context-parallel ranks", _labels_of_the_whole_pack, Layout(context=2)),
    Bug("key and value gradients doubled under context parallelism", _context_gradient_doubled, Layout(context=2)),
    Bug(
        "soft-token gradients not reduced across context-parallel ranks",
        _context_gradient_kept_apart,
        Layout(context=2, media="image"),
    ),
    Bug(
        "norm gradients not all-reduced under sequence parallelism",
        _sequence_parallel_reduce_missing,
        Layout(tensor=2, sequence=True, trains="full"),
    ),
    Bug(
        "trainable encoder's gradients not reduced across tensor-parallel ranks",
        _trainable_encoder_not_summed,
        Layout(tensor=2, media="imu"),
    ),
    Bug(
        "gradients of tied embedding and head not reduced across stages",
        _tied_head_apart,
        Layout(pipeline=2, trains="full", tied_head=True),
    ),
    Bug(
        "layers of two virtual pipeline chunks swapped",
        _virtual_parts_in_the_wrong_order,
        Layout(pipeline=2, virtual=2),
    ),
    Bug("loss averaged per rank instead of over all target tokens", _mean_over_ranks, Layout(data=2)),
    Bug(
        "text-only micro-batches overwrite the projectors' gradients",
        _projector_gradient_lost_on_text,
        Layout(media="few media"),
    ),
    Bug(
        "gradient of the head's input not reduced across vocabulary shards",
        _head_gradient_not_summed,
        Layout(tensor=2),
    ),
    Bug("backward pass skipped for packs with media", _backward_skipped_with_media, Layout()),
    Bug("no gradient reaches the projectors through a frozen Llama", _frozen_llama_passes_no_gradient, Layout()),
    Bug("gradient of each step's first micro-batch dropped", _first_micro_batch_lost, Layout()),
    Bug(
        "only the last micro-batch's gradient kept if lengths change (pipeline)",
        _last_micro_batch_alone,
        dataclasses.replace(_SFT, pipeline=2),
    ),
    Bug(
        "NEFTune noise indexed by position in the pack, not in the document",
        _noise_by_place_in_the_pack,
        dataclasses.replace(_SFT, data=2),
    ),
    Bug(
        "adapter gradients not all-reduced under sequence parallelism",
        _adapters_sequence_parallel_reduce_missing,
        dataclasses.replace(_SFT, tensor=2, sequence=True),
    ),
    Bug(
        "adapters get no gradient under full recomputation with one stage",
        _recomputed_layers_without_gradient,
        dataclasses.replace(_DPO_CP2, context=1, recompute="full"),
    ),
    Bug(
        "DPO's reference model is the base model, not the SFT model",
        _reference_without_adapters,
        dataclasses.replace(_DPO_CP2, context=1),
    ),
    Bug(
        "DPO gradients multiplied by the number of context-parallel ranks",
        _pairs_counted_once_per_context_rank,
        _DPO_CP2,
    ),
    Bug("chosen and rejected swapped on one context-parallel rank", _answers_exchanged_on_one_rank, _DPO_CP2),
)
