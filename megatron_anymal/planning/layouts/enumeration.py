"""Every parallel layout of a run that the checks allow."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

from transformers import LlamaConfig

from megatron_anymal.config import ConfigError, ModelConfig, RunConfig
from megatron_anymal.config.layout_validation import check_layout
from megatron_anymal.model.llama_shape import check_sizes


class Layout(NamedTuple):
    """A parallel layout, without the recomputation. Fields have the names of the keys of `model` that they set.

    Attributes:
        tensor_model_parallel_size: tensor-parallel ranks.
        sequence_parallel: whether norms and residuals are split over them.
        pipeline_model_parallel_size: pipeline stages.
        virtual_pipeline_model_parallel_size: model chunks per stage.
        context_parallel_size: context-parallel ranks.
        num_layers_in_first_pipeline_stage: layers of the first stage; 0: as many as the others.
        num_layers_in_last_pipeline_stage: the same for the last stage.
        fp8: number format of matrix products, "" for that of the precision.
        fp8_primary_weights: whether the frozen Llama's matrices are stored in FP8.
    """

    tensor_model_parallel_size: int
    sequence_parallel: bool
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int
    context_parallel_size: int
    num_layers_in_first_pipeline_stage: int
    num_layers_in_last_pipeline_stage: int
    fp8: str
    fp8_primary_weights: bool

    def __str__(self) -> str:
        text = f"TP{self.tensor_model_parallel_size}{'+SP' if self.sequence_parallel else ''}"
        text += f" PP{self.pipeline_model_parallel_size}"
        if self.virtual_pipeline_model_parallel_size > 1:
            text += f"x{self.virtual_pipeline_model_parallel_size}"
        edges = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        if any(edges):
            text += f"({edges[0] or '='},{edges[1] or '='})"
        text += f" CP{self.context_parallel_size}"
        return text + (f" fp8{' weights' if self.fp8_primary_weights else ''}" if self.fp8 else "")

    def applied(self, model: ModelConfig) -> ModelConfig:
        """Return a copy of the section with this layout; its own sections are shared."""
        result = copy.copy(model)
        for name, value in self._asdict().items():
            setattr(result, name, value)
        if not self.fp8:
            result.fp8_recipe = ModelConfig().fp8_recipe
        if self.pipeline_model_parallel_size == 1:
            # The checks refuse encoders on all stages of one.
            result.encoder_placement = ModelConfig().encoder_placement
        return result


def allowed_layouts(config: RunConfig, hf: LlamaConfig, kept: Collection[str], *, fp8: bool) -> list[Layout]:
    """Return all layouts of the run's number of processes that the configuration's checks and the Llama's sizes allow.

    The configured recomputation restricts none of them, since it is chosen for each.

    Args:
        config: a configuration that passes the checks; it sets the number of processes.
        kept: keys of `model` that stay as configured.
        fp8: whether the GPU and the layers compute in FP8.
    """
    trial = copy.copy(config)
    base = copy.copy(config.model)
    base.recompute_granularity = ""
    allowed: list[Layout] = []
    for splits in _candidates(config, hf.num_hidden_layers, fp8):
        # Splits differ in nothing that the checks see but their divisibility, which all of them have.
        trial.model = splits[0].applied(base)
        if trial.world_size % trial.model.model_parallel_size == 0 and _is_allowed(trial, hf):
            allowed += (one for one in splits if all(getattr(one, key) == getattr(config.model, key) for key in kept))
    return allowed


def _is_allowed(config: RunConfig, hf: LlamaConfig) -> bool:
    try:
        check_layout(config)
        check_sizes(config.model, hf)
    except ConfigError:
        return False
    return True


def _candidates(config: RunConfig, layers: int, fp8: bool) -> Iterator[list[Layout]]:
    """Yield combinations of divisors of the number of processes and of number formats, each with all splits of the
    layers."""
    ranks = config.world_size
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    splits = {(n, chunks): pairs for n in sizes if n <= layers for chunks, pairs in _splits(layers, n).items()}
    formats = _formats(config.model, fp8)
    for tensor in sizes:
        for context in (size for size in sizes if ranks % (tensor * size) == 0):
            for (stages, chunks), pairs in splits.items():
                if ranks % (tensor * context * stages) == 0:
                    for sequence, name in itertools.product((False, True), formats):
                        yield [Layout(tensor, sequence, stages, chunks, context, *pair, *name) for pair in pairs]


def _splits(layers: int, stages: int) -> dict[int, list[tuple[int, int]]]:
    """Return, by the number of chunks per stage, the layers of the first and of the last stage (0: as many as the
    others have)."""
    by_chunks: dict[int, list[tuple[int, int]]] = {}
    for counts in _counts(layers, stages):
        first, middle, last = counts
        common = math.gcd(*counts)
        pair = first if first != middle else 0, last if last != middle else 0
        for chunks in range(1, (common if stages > 1 else 1) + 1):
            if common % chunks == 0:
                by_chunks.setdefault(chunks, []).append(pair)
    return by_chunks


def _counts(layers: int, stages: int) -> Iterator[tuple[int, int, int]]:
    """Yield the layers of the first, of each middle and of the last stage."""
    if stages == 1:
        yield layers, layers, layers
        return
    if stages == 2:
        # The second stage has what the first one leaves.
        yield from ((first, layers - first, layers - first) for first in range(1, layers))
        return
    for middle in range(1, layers // (stages - 2) + 1):
        edges = layers - middle * (stages - 2)
        yield from ((first, middle, edges - first) for first in range(1, edges))


def _formats(model: ModelConfig, fp8: bool) -> list[tuple[str, bool]]:
    """The values of model.fp8 and model.fp8_primary_weights to try."""
    if not fp8:
        return [(model.fp8, model.fp8_primary_weights)]
    name = model.fp8 or "hybrid"
    return [("", False), (name, False), (name, True)]
