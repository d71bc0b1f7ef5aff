"""What a training step computes on: tokens, documents, labels and encoder inputs, from an index or from assumptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Optional

import numpy as np

from megatron_anymal.config import DiscreteConfig, ModelConfig, StorageConfig
from megatron_anymal.data.codes import plan_kinds
from megatron_anymal.data.configured_modality import PlannedModality
from megatron_anymal.data.context_parallel import padded
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.data.records import DataError
from megatron_anymal.data.sample_measures import measure_samples
from megatron_anymal.data.shard_index import ShardIndex

# Packs are padded to the longest one, which is this much longer than the mean (data/packing.py).
UNEVENNESS = 1.02
# Text tokens of a sample with media if neither data nor an option says otherwise.
TEXT_TOKENS = 64
# Samples of a data set that are measured.
_MEASURED = 100_000


@dataclass(frozen=True)
class Workload:
    """The sums over one global batch.

    Attributes:
        samples: samples per step.
        tokens: LLM tokens of all documents.
        squares: sum of the documents' squared lengths, which attention's work is proportional to.
        longest: tokens of the longest document.
        labels: tokens with a label.
        pieces: encoder inputs of each modality, by its name.
        origin: where the numbers come from.
    """

    samples: int
    tokens: float
    squares: float
    longest: int
    labels: float
    pieces: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True)
class PackLoad:
    """The mean micro-batch of a step under a layout.

    Attributes:
        number: micro-batches per step and replica.
        tokens: tokens with padding, over all context-parallel ranks.
        squares: sum of its documents' squared lengths.
        labels: its tokens with a label.
        pieces: its encoder inputs of each modality.
    """

    number: int
    tokens: int
    squares: float
    labels: float
    pieces: tuple[tuple[str, float], ...]


def pack_load(work: Workload, layout: BatchLayout) -> PackLoad:
    """Distribute a step's documents over packs as the planner does: as few as hold them, a multiple of what the layout
    needs, of nearly equal lengths."""
    multiple = layout.data_parallel_size * layout.micro_batch_size * layout.micro_batches_multiple
    mean_document = work.tokens / work.samples
    aligned = work.tokens * padded(int(mean_document), layout.document_multiple) / max(1, int(mean_document))
    packs = padded(max(1, -int(-aligned // layout.seq_length)), multiple)
    length = min(layout.seq_length, max(work.longest, int(UNEVENNESS * aligned / packs)))
    batches = packs // layout.micro_batch_size
    return PackLoad(
        number=batches // layout.data_parallel_size,
        tokens=padded(max(1, length) * layout.micro_batch_size, layout.length_multiple),
        squares=work.squares / batches,
        labels=work.labels / batches,
        pieces=tuple((name, count / batches) for name, count in work.pieces.items()),
    )


def assumed_workload(model: ModelConfig, seq_length: int, sample_tokens: int = 0, label_share: float = 0.0) -> Workload:
    """Assume every sample to be alike: one encoder input of each modality in turn and TEXT_TOKENS of text, or without
    modalities a document as long as a pack.

    Args:
        seq_length: `data.seq_length`.
        sample_tokens: LLM tokens of a sample, soft tokens included; 0: as above.
        label_share: share of the tokens with a label; 0: the text, or without modalities all.
    """
    soft = [section.projector.num_tokens for section in model.modalities.values()]
    mean_soft = sum(soft) / len(soft) if soft else 0.0
    tokens = sample_tokens or min(seq_length, round(mean_soft + TEXT_TOKENS) if soft else seq_length)
    share = label_share or max(0.0, tokens - mean_soft) / tokens
    samples = model.global_batch_size
    what = f"one encoder input plus text, {tokens:,} tokens in all" if soft else f"a document of {tokens:,} tokens"
    return Workload(
        samples=samples,
        tokens=samples * tokens,
        squares=samples * tokens**2,
        longest=tokens,
        labels=samples * tokens * share,
        pieces={name: samples / len(soft) for name in model.modalities},
        origin=f"assumed: every sample is {what}, {share:.0%} of them with a label",
    )


def measured_workload(
    folders: Sequence[tuple[str, float]],
    modalities: Sequence[PlannedModality],
    samples: int,
    seq_length: int,
    storage: Optional[StorageConfig] = None,
    *,
    shared_prompts: bool = False,
    discrete: Mapping[str, DiscreteConfig] = MappingProxyType({}),
) -> Workload:
    """Expect the mean of what the indexes of data sets hold.

    Args:
        folders: path and sampling weight of each data set.
        modalities: of the configuration.
        samples: `model.global_batch_size`.
        seq_length: `data.seq_length`; longer samples are left out.
        storage: how folders on object storage are read. None: the defaults.
        shared_prompts: packs hold the prompt of a pair once.
        discrete: `model.discrete`.

    Raises:
        DataError: a folder has no index, media without a configured modality, codes that `discrete` does not fit, or
            no sample that fits.
        StorageError: an object store, or the cache for its indexes, cannot be used.
    """
    by_kind = {modality.kind: modality for modality in modalities}
    total = sum(weight for _, weight in folders)
    sums, longest, pieces = np.zeros(3), 0, dict.fromkeys((m.name for m in modalities), 0.0)
    for folder, weight in folders:
        index = ShardIndex(folder, storage=storage)
        codes = plan_kinds(index.kinds_used(), discrete, repr(folder))
        missing = index.kinds_used() - set(by_kind) - set(codes)
        if missing:
            raise DataError(
                f"{folder!r} contains {min(missing)}, for which no modality is configured. Add "
                f"model.modalities.{min(missing)}, or name another folder."
            )
        rows = np.unique(np.linspace(0, len(index) - 1, min(len(index), _MEASURED)).astype(np.int64))
        measures = measure_samples(index, rows, by_kind, codes, shared_prompts=shared_prompts)
        fits = measures.length <= seq_length
        if not fits.any():
            raise DataError(f"{folder!r} has no sample within data.seq_length={seq_length}. Raise it.")
        share = samples * weight / total / fits.sum()
        # The square of a shared prompt is part of both documents' squares, but it is computed once.
        squares = (measures.documents[fits] ** 2).sum() - (measures.shared[fits] ** 2).sum()
        sums += share * np.array([measures.length[fits].sum(), squares, measures.targets[fits].sum()])
        longest = max(longest, int(measures.length[fits].max()))
        for number, modality in enumerate(modalities):
            mine = (measures.modality == number) & fits[measures.owner]
            pieces[modality.name] += share * float(measures.pieces[mine].sum())
    names = ", ".join(folder for folder, _ in folders)
    return Workload(samples, sums[0], sums[1], longest, sums[2], pieces, f"from the index of {names}")
