"""Planted bugs: silent failures of distributed training, enabled one at a time. The suite must catch every one.

`Bug.plant` is called in every rank process before the model is built, and patches the package there.

Positions that continue across a document boundary are not included: rotary embeddings depend only on the distance
between two tokens, so they change nothing but rounding.
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
    """A planted bug, and a layout that it affects."""

    # One line, for reports and test ids.
    what: str
    plant: Callable[[], None]
    layout: Layout


def wrap(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace `owner.name` with `change`, which gets the original as its first argument."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def _stage_without_document_lengths() -> None:
    def one_document(original: Any, lengths: Any, *args: Any) -> Any:
        whole = lengths if parallel_state.is_pipeline_first_stage() else (sum(lengths),)
        return original(whole, *args)

    wrap(anymal, "document_pack", one_document)


def _features_in_the_wrong_order() -> None:
    def swapped(original: Any, mine: Any, parts: Any) -> Any:
        features = original(mine, parts)
        return features.flip(0) if parallel_state.get_tensor_model_parallel_rank() == 1 else features

    wrap(anymal, "gather_features", swapped)


def _soft_tokens_shifted() -> None:
    def shifted(original: Any, mine: Any, parts: Any) -> Any:
        return [soft.roll(1, 0) for soft in original(mine, parts)]

    wrap(anymal, "gather_soft_tokens", shifted)


def _sequence_parallel_reduce_missing() -> None:
    def unmarked(original: Any, self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        self.weight.sequence_parallel = False

    wrap(llama.RMSNorm, "__init__", unmarked)


def _key_value_gradients_doubled() -> None:
    def doubled(original: Any, key: Any, value: Any, index: Any) -> Any:
        # Doubles the gradient without changing the value.
        return original(*(2 * x - x.detach() for x in (key, value)), index)

    wrap(attention, "_gather_keys", doubled)


def _soft_token_gradients_not_reduced() -> None:
    def gather(mine: Any, parts: Any) -> Any:
        with torch.no_grad():
            gathered = [soft.clone() for soft in shares.gather_soft_tokens(mine, parts)]
        # Soft tokens get gradients only from tokens on the rank that encoded them.
        rank, whole = parallel_state.get_context_parallel_rank(), []
        for own, soft, of_ranks in zip(mine, gathered, parts):
            first = sum(of_ranks[:rank])
            whole.append(torch.cat([soft[:first], own, soft[first + len(own) :]]))
        return whole

    anymal.gather_soft_tokens = gather


def _attention_crosses_documents() -> None:
    def leaking(original: Any, lengths: Any, *args: Any) -> Any:
        pack = original(lengths, *args)
        if len(lengths) > 1:
            joined = original((lengths[0] + lengths[1], *lengths[2:]), *args)
            pack.kernel = joined.kernel
        return pack

    wrap(anymal, "document_pack", leaking)


def _answer_sees_the_other_one() -> None:
    def leaking(original: Any, lengths: Any, *args: Any) -> Any:
        *more, prompts = args
        first = {prompt: number for number, prompt in sorted(prompts.items(), reverse=True)}
        # The chosen answer follows its prompt, so a longer prompt includes it.
        longer = {
            number: prompt._replace(length=prompt.length + (lengths[first[prompt]] if number > first[prompt] else 0))
            for number, prompt in prompts.items()
        }
        pack = original(lengths, *args)
        pack.kernel = original(lengths, *more, longer).kernel
        return pack

    wrap(anymal, "document_pack", leaking)


def _answer_behind_the_other_one() -> None:
    def behind(original: Any, lengths: Any, prompts: Any) -> Any:
        positions = original(lengths, prompts).split(list(lengths))
        first = {prompt: number for number, prompt in sorted(prompts.items(), reverse=True)}
        moved = [
            own + (lengths[first[prompts[number]]] if number in prompts and number > first[prompts[number]] else 0)
            for number, own in enumerate(positions)
        ]
        return torch.cat(moved)

    wrap(attention, "token_positions", behind)


def _contiguous_positions() -> None:
    def contiguous(original: Any, lengths: Any, *args: Any) -> Any:
        pack = original(lengths, *args)
        own, rank = len(pack.rotation.cos), parallel_state.get_context_parallel_rank()
        positions = torch.cat([torch.arange(length) for length in lengths])
        pack.rotation = rotation(positions[rank * own : (rank + 1) * own], args[1])
        return pack

    wrap(anymal, "document_pack", contiguous)


def _head_gradient_not_reduced() -> None:
    head.copy_to_tensor_model_parallel_region = lambda rows: rows


def _backward_skipped_with_media() -> None:
    anymal.AnyMALModel._has_gradient = lambda self, micro_batch: False  # type: ignore[method-assign]


def _mean_over_ranks() -> None:
    def of_own_tokens(original: Any, losses: Any, mask: Any, targets: int) -> Any:
        own = int(mask.sum()) * parallel_state.get_data_parallel_world_size()
        return original(losses, mask, own)

    wrap(objective, "batch_mean", of_own_tokens)


def _projector_gradient_overwritten_by_text() -> None:
    def forward(original: Any, self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and not micro_batch.media:
            parameter: Any
            for parameter in self.projectors.parameters():
                # The zero gradient of a text-only micro-batch overwrites the accumulated gradient.
                parameter.main_grad.zero_()
        return original(self, micro_batch, *args, **kwargs)

    wrap(anymal.AnyMALModel, "forward", forward)


def _frozen_llama_passes_no_gradient() -> None:
    def cut(original: Any, text: Any, soft: Any, positions: Any) -> Any:
        return original(text, soft, positions).detach()

    wrap(anymal, "merge", cut)


def _encoder_gradient_not_reduced() -> None:
    model_build.share_gradients = lambda encoder: None


def _first_micro_batch_dropped() -> None:
    steps: set[int] = set()

    def forward(original: Any, self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, micro_batch, *args, **kwargs)
        if micro_batch.plan.step in steps:
            return output
        steps.add(micro_batch.plan.step)
        return output.detach().requires_grad_()

    wrap(anymal.AnyMALModel, "forward", forward)


def _only_last_micro_batch_kept() -> None:
    before: dict[int, tuple[int, ...]] = {}

    def forward(original: Any, self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, micro_batch, *args, **kwargs)
        if parallel_state.get_pipeline_model_parallel_world_size() == 1 or not output.requires_grad:
            return output

        def overwrite(gradient: Any) -> None:
            # Runs at the start of the stage's backward pass of this micro-batch, before any gradient is accumulated.
            if before.get(id(self)) != micro_batch.document_lengths:
                parameter: Any
                for parameter in self.parameters():
                    if parameter.requires_grad:
                        parameter.main_grad.zero_()
            before[id(self)] = micro_batch.document_lengths

        output.register_hook(overwrite)
        return output

    wrap(anymal.AnyMALModel, "forward", forward)


def _recomputed_layers_without_gradient() -> None:
    def embed(original: Any, self: Any, *args: Any) -> Any:
        # Projectors are frozen in this layout, so the Llama's input requires a gradient only because the model sets it.
        return original(self, *args).detach()

    wrap(anymal.AnyMALModel, "embed", embed)


def _tied_gradients_not_reduced() -> None:
    # The package exports a function of the same name, which hides the module.
    finalize: Any = sys.modules["megatron.core.distributed.finalize_model_grads"]
    finalize._allreduce_word_embedding_grads = lambda *args, **kwargs: None


def _virtual_chunks_swapped() -> None:
    def swapped(original: Any, *args: Any) -> Any:
        parts = original(*args)
        if len(parts) > 1 and parallel_state.get_pipeline_model_parallel_rank() == 0:
            first, last = (part.language_model.decoder.layers for part in parts[:2])
            parts[0].language_model.decoder.layers, parts[1].language_model.decoder.layers = last, first
        return parts

    wrap(train_build, "build_models", swapped)


def _labels_not_split() -> None:
    def unsplit(original: Any, self: Any, micro_batch: Any) -> Any:
        mine = original(self, micro_batch)
        own = mine.labels.size(1)
        return dataclasses.replace(mine, labels=micro_batch.labels[:, :own])

    wrap(loader.MicroBatchReader, "_own_part", unsplit)


def _noise_by_position_in_pack() -> None:
    def in_pack(original: Any, micro_batch: Any) -> Any:
        documents, positions = original(micro_batch)
        return documents.clamp(max=0), torch.arange(len(positions))

    wrap(anymal, "_name_tokens", in_pack)


def _adapters_sequence_parallel_reduce_missing() -> None:
    def unmarked(original: Any, self: Any, *args: Any) -> None:
        original(self, *args)
        self.A.sequence_parallel = False

    wrap(lora._Projection, "__init__", unmarked)


def _reference_without_adapters() -> None:
    def of_the_base(original: Any, models: Any) -> None:
        original(models)
        for projection in lora._projections(models):
            a, b = projection.kept
            projection.kept = a, torch.zeros_like(b)

    wrap(train_restore, "keep_reference", of_the_base)


def _pairs_counted_once_per_context_rank() -> None:
    def summed(parts: Any, group: Any) -> Any:
        # The backward pass of this all-reduce sums over the ranks again.
        return dist.nn.functional.all_reduce(parts.contiguous(), group=group)

    objective.sum_over_context = summed


def _answers_swapped_on_one_rank() -> None:
    def swapped(original: Any, self: Any, micro_batch: Any) -> Any:
        mine = original(self, micro_batch)
        if parallel_state.get_context_parallel_rank() == 0:
            return mine
        return dataclasses.replace(mine, branch=torch.where(mine.branch < 0, -1, 1 - mine.branch))

    wrap(loader.MicroBatchReader, "_own_part", swapped)


# Layouts of test_parity.py if one of them shows the bug: their runs without it then serve both tests.
_CP2 = Layout(context=2, recompute="full")
_TP2_SP = Layout(tensor=2, sequence=True, trains="full", recompute="selective")
_SFT = Layout(job="sft", trains="lora", noise="all")
_DPO_CP2 = Layout(job="dpo", trains="lora", noise="all", context=2, reference="cached")
# Pairs share their prompts if nothing is random.
_DPO_SHARED = Layout(job="dpo", trains="lora", smoothing=0.0, media="few media")

BUGS = (
    Bug(
        "later pipeline stages treat a pack as one document",
        _stage_without_document_lengths,
        Layout(pipeline=2, uneven=True, trains="partial", tied_head=True),
    ),
    Bug("attention crosses a document boundary", _attention_crosses_documents, Layout()),
    Bug(
        "encoder features in the wrong order on one tensor-parallel rank",
        _features_in_the_wrong_order,
        Layout(tensor=2, media="image"),
    ),
    Bug(
        "soft tokens shifted by one image tile under context parallelism",
        _soft_tokens_shifted,
        _CP2,
    ),
    Bug(
        "contiguous instead of zig-zag positions under context parallelism",
        _contiguous_positions,
        _CP2,
    ),
    Bug("labels not split across context-parallel ranks", _labels_not_split, _CP2),
    Bug("key and value gradients doubled under context parallelism", _key_value_gradients_doubled, _CP2),
    Bug(
        "soft-token gradients not reduced across context-parallel ranks",
        _soft_token_gradients_not_reduced,
        _CP2,
    ),
    Bug(
        "norm gradients not all-reduced under sequence parallelism",
        _sequence_parallel_reduce_missing,
        _TP2_SP,
    ),
    Bug(
        "trainable encoder's gradients not reduced across tensor-parallel ranks",
        _encoder_gradient_not_reduced,
        _TP2_SP,
    ),
    Bug(
        "gradients of tied embedding and head not reduced across stages",
        _tied_gradients_not_reduced,
        Layout(pipeline=2, trains="full", tied_head=True),
    ),
    Bug(
        "layers of two virtual pipeline chunks swapped",
        _virtual_chunks_swapped,
        Layout(pipeline=2, virtual=2, overlap=True, trains="full", media="few media"),
    ),
    Bug(
        "loss averaged per rank instead of over all target tokens",
        _mean_over_ranks,
        Layout(data=2, overlap=True, media="few media"),
    ),
    Bug(
        "text-only micro-batches overwrite the projectors' gradients",
        _projector_gradient_overwritten_by_text,
        Layout(media="few media"),
    ),
    Bug(
        "gradient of the head's input not reduced across vocabulary shards",
        _head_gradient_not_reduced,
        Layout(tensor=2),
    ),
    Bug("backward pass skipped for packs with media", _backward_skipped_with_media, Layout()),
    Bug("no gradient reaches the projectors through a frozen Llama", _frozen_llama_passes_no_gradient, Layout()),
    Bug("gradient of each step's first micro-batch dropped", _first_micro_batch_dropped, Layout()),
    Bug(
        "only the last micro-batch's gradient kept if lengths change in a pipeline",
        _only_last_micro_batch_kept,
        dataclasses.replace(_SFT, pipeline=2),
    ),
    Bug(
        "NEFTune noise indexed by position in the pack, not in the document",
        _noise_by_position_in_pack,
        dataclasses.replace(_SFT, tensor=2, sequence=True),
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
    Bug("the rejected answer sees the chosen one", _answer_sees_the_other_one, _DPO_SHARED),
    Bug("the rejected answer's positions follow the chosen one's", _answer_behind_the_other_one, _DPO_SHARED),
    Bug("chosen and rejected swapped on one context-parallel rank", _answers_swapped_on_one_rank, _DPO_CP2),
)
