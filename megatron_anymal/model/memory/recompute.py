"""Activation recomputation: the settings that megatron-core supports, and the cheapest that fits in memory.

One choice holds for the whole job. megatron-core reads the setting on each rank, so stages could differ; but a pipeline
runs at the pace of its slowest stage, the one that recomputes most, and recomputing less on the others would only make
them wait longer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_anymal.config import ConfigError, ModelConfig
from megatron_anymal.model.memory.rank_memory import Held, held
from megatron_anymal.model.memory.sizes import Recompute, RunSizes

# Share of GPU memory that is reserved for CUDA, NCCL and fragmentation.
MARGIN = 0.1
_GB = 1e9
# Recomputing less than every layer saves at most this share of the total: the recomputed layer itself.
_HOPELESS = 1.25


@dataclass(frozen=True)
class Choice:
    """The activation recomputation of a run and the resulting memory use.

    Attributes:
        recompute: the settings.
        held: memory use of a rank, per pipeline stage.
        memory: available bytes; 0 if unknown.
        without: bytes that the worst rank would hold without recomputation.
    """

    recompute: Recompute
    held: tuple[Held, ...]
    memory: int
    without: int

    @property
    def worst(self) -> int:
        """The stage whose ranks need the most memory."""
        return max(range(len(self.held)), key=lambda stage: self.held[stage].total)

    def __str__(self) -> str:
        most = self.held[self.worst].total
        why = f"{most / _GB:.1f} GB on a rank of stage {self.worst}, of {self.memory / _GB:.1f} GB"
        if self.recompute.granularity:
            why += f"; {self.without / _GB:.1f} GB without"
        return f"{self.recompute} ({why})"

    def applied(self, model: ModelConfig) -> ModelConfig:
        """Return a copy of the section with `auto` replaced by the choice."""
        model, chosen = copy.deepcopy(model), self.recompute
        model.recompute_granularity, model.recompute_modules = chosen.granularity, list(chosen.modules)
        model.recompute_method, model.recompute_num_layers = chosen.method, chosen.layers
        return model


def configured(model: ModelConfig) -> Recompute:
    """Return the recomputation that a configuration sets; auto counts as none."""
    if model.recompute_granularity == "selective":
        return Recompute("selective", tuple(model.recompute_modules))
    if model.recompute_granularity == "full":
        return Recompute("full", (), model.recompute_method, model.recompute_num_layers)
    return Recompute()


def choose(run: RunSizes, memory: int) -> Choice:
    """Return the recomputation with the least extra work with which every rank fits.

    Args:
        memory: bytes available to a rank.

    Raises:
        ConfigError: nothing fits.
    """
    cheapest = cheapest_that_fits(run, memory)
    if cheapest is not None:
        return judge(run, cheapest, memory)
    # The last candidate recomputes everything.
    choice = judge(run, candidates(run)[-1], memory)
    most = choice.held[choice.worst]
    kinds = ("weights", "gradients", "optimizer", "activations", "working")
    listed = ", ".join(f"{name} {getattr(most, name) / _GB:.1f}" for name in kinds)
    raise ConfigError(
        f"model.recompute_granularity=auto: nothing fits. A rank of pipeline stage {choice.worst} holds "
        f"{most.total / _GB:.1f} GB even with every layer recomputed ({listed}), but only {memory / _GB:.1f} GB are "
        "available (model.memory_gb). Lower data.seq_length or model.micro_batch_size, or raise "
        "model.tensor_model_parallel_size or model.pipeline_model_parallel_size."
    )


def cheapest_that_fits(run: RunSizes, memory: int) -> Recompute | None:
    """Return the recomputation with the least extra work with which every rank fits; None if there is none.

    Args:
        memory: bytes available to a rank.
    """
    return next(_that_fit(run, memory), None)


def least_that_fit(run: RunSizes, memory: int) -> list[Recompute]:
    """Return the smallest setting of each kind of recomputation with which every rank fits, in order of extra work.

    Which of them is fastest depends on the documents, whose attention may take far less than that of a full pack.

    Args:
        memory: bytes available to a rank.
    """
    least: dict[tuple[str, tuple[str, ...]], Recompute] = {}
    for one in _that_fit(run, memory):
        if not one.granularity:
            return [one]
        least.setdefault((one.granularity, one.modules), one)
    return list(least.values())


def _that_fit(run: RunSizes, memory: int) -> Iterator[Recompute]:
    """Yield the candidates with which every rank fits, in order of extra work, the least first."""
    # The stages that usually hold most come first.
    stages = sorted(range(len(run.stages)), key=lambda stage: (0 < stage < len(run.stages) - 1, stage))
    options = candidates(run)
    if held(run, 0, options[-1]).total > _HOPELESS * memory:
        return
    for one in options:
        if all(held(run, stage, one).total <= memory for stage in stages):
            yield one


def judge(run: RunSizes, recompute: Recompute, memory: int) -> Choice:
    """Return the memory use of a given recomputation; `memory` is the available bytes, 0 if unknown."""
    return Choice(recompute, _held(run, recompute), memory, max(of.total for of in _held(run, Recompute())))


def candidates(run: RunSizes) -> list[Recompute]:
    """Return the recomputations that are considered, in order of extra work; the last one recomputes every layer."""
    longest = max(map(max, run.chunk_lengths))
    options = [Recompute(), Recompute("selective", ("core_attn",)), Recompute("selective", ("core_attn", "mlp"))]
    options += [Recompute("full", (), "block", layers) for layers in range(1, longest + 1)]
    return sorted(options, key=lambda recompute: repeated_share(run, recompute))


def repeated_share(run: RunSizes, recompute: Recompute) -> float:
    """Return the share of the layers' forward pass that is computed twice, on the stage with the largest share."""
    llama, tokens = run.llama, run.pack.tokens
    # Multiply-adds per token and layer; attention over one document as long as the pack, half of it masked.
    attention = llama.queries * tokens * llama.context
    mlp = 3 * llama.hidden * llama.ffn // llama.tensor
    whole = attention + mlp + llama.hidden * 2 * (llama.queries + llama.keys)
    if recompute.granularity == "selective":
        return sum({"core_attn": attention, "mlp": mlp}.get(name, 0) for name in recompute.modules) / whole
    shares = [
        sum(recompute.repeated(length) for length in lengths) / max(1, sum(lengths)) for lengths in run.chunk_lengths
    ]
    return max(shares)


def _held(run: RunSizes, recompute: Recompute) -> tuple[Held, ...]:
    return tuple(held(run, stage, recompute) for stage in range(len(run.stages)))


def planned_attention(model: ModelConfig) -> str:
    """Return the attention kernel that a run on GPUs with all optional packages would use."""
    return "flash_attn" if model.transformer_impl == "local" or model.base_quantization else "transformer_engine"
