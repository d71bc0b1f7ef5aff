"""Find the fastest layouts that fit: best first, by a lower bound of the step's time.

Every allowed layout gets a lower bound. They are examined in its order: memory is counted, and the step is simulated
if it fits. Once the bound exceeds what has been found, no layout that is left can be faster.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import LlamaConfig

from megatron_anymal.config import ConfigError, ModalityConfig, RunConfig
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.data.shared_prompts import shares_prompts
from megatron_anymal.model.memory.media import EncoderSizes
from megatron_anymal.model.memory.rank_memory import Held, held
from megatron_anymal.model.memory.recompute import Choice, candidates, judge, least_that_fit, planned_attention
from megatron_anymal.model.memory.run_sizes import llama_sizes, run_sizes
from megatron_anymal.model.memory.sizes import LlamaSizes, RunSizes
from megatron_anymal.planning.layouts.collectives import links_of_layout
from megatron_anymal.planning.layouts.enumeration import Layout, allowed_layouts
from megatron_anymal.planning.layouts.hardware import Hardware, number_format
from megatron_anymal.planning.layouts.layer_time import PassTime
from megatron_anymal.planning.layouts.step_time import (
    StepInputs,
    StepTime,
    first_chunk_extra,
    last_chunk_extra,
    layer_of,
    message_seconds,
    step_time,
)
from megatron_anymal.planning.layouts.workload import Workload, pack_load


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and its predicted step."""

    # The parallel layout.
    layout: Layout
    # Its recomputation and memory use.
    choice: Choice
    # Its time.
    step: StepTime
    # What the time was computed from.
    inputs: StepInputs


@dataclass(frozen=True)
class Miss:
    """A layout that does not fit, with the most recomputation.

    Attributes:
        layout: the parallel layout.
        stage: the pipeline stage that holds the most.
        held: the memory use of a rank of that stage.
        seconds: lower bound of the step's time.
    """

    layout: Layout
    stage: int
    held: Held
    seconds: float


@dataclass
class SearchResult:
    """What a search has found.

    Attributes:
        ranked: the fastest layouts that fit, one per combination of parallel sizes and number format.
        misses: faster layouts that do not fit, those that lack the least memory first.
        allowed: number of layouts that the checks allow.
        examined: number of layouts whose memory was counted.
        simulated: number of layouts whose step was simulated.
    """

    ranked: list[Candidate] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    allowed: int = 0
    examined: int = 0
    simulated: int = 0


class LayoutProblem:
    """A run on given hardware, for which layouts are compared."""

    def __init__(
        self,
        config: RunConfig,
        hf: LlamaConfig,
        gpu: Hardware,
        work: Workload,
        encoders: Sequence[tuple[ModalityConfig, EncoderSizes]],
        memory: int,
    ) -> None:
        """Take what all layouts share.

        Args:
            config: a checked configuration with the job's nodes and devices.
            work: sums over a global batch.
            encoders: section and sizes of each modality, in the configuration's order.
            memory: bytes available to a rank.
        """
        self.config, self.hf, self.gpu, self.work, self.memory = config, hf, gpu, work, memory
        self.encoders = tuple(encoders)
        self._llamas: dict[tuple[object, ...], LlamaSizes] = {}

    @property
    def computes_fp8(self) -> bool:
        """Whether layouts in FP8 are possible: the GPU, Transformer Engine's layers and bf16."""
        model = self.config.model
        if model.transformer_impl == "local" or model.base_quantization:
            return False
        return self.gpu.fp8_tflops > 0 and self.config.trainer.precision == "bf16"

    def layouts(self, kept: Collection[str] = ()) -> list[Layout]:
        """Return all layouts that the checks allow.

        Args:
            kept: keys of `model` that stay as configured.

        Raises:
            ConfigError: the configuration computes in FP8, which the GPU cannot, or in NVFP4.
        """
        if self.config.model.fp8 and not self.gpu.fp8_tflops:
            raise ConfigError(
                f"model.fp8={self.config.model.fp8}, but {self.gpu.name} has no FP8 rate. Set model.fp8='' "
                "model.fp8_primary_weights=false, or name another --gpu."
            )
        if self.config.model.fp4:
            raise ConfigError(
                f"model.fp4={self.config.model.fp4}: no rate of NVFP4 products is known for {self.gpu.name}. Set "
                "model.fp4='' to plan in bf16 or FP8."
            )
        return allowed_layouts(self.config, self.hf, kept, fp8=self.computes_fp8)

    def inputs(self, layout: Layout) -> StepInputs:
        """Return the sizes of a rank and of a micro-batch under a layout.

        Raises:
            ConfigError: the layout does not divide the layers.
        """
        config, model = self.config, layout.applied(self.config.model)
        replicas = config.world_size // model.model_parallel_size
        shared = shares_prompts(config.job, model, planned_attention(model))
        batches = BatchLayout.of(model, config.data.seq_length, replicas, shared_prompts=shared)
        tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
        names = config.model.modalities
        return StepInputs(
            gpu=self.gpu,
            links=links_of_layout(self.gpu, config.trainer.devices, tensor, context, replicas),
            sizes=self._sizes(layout, batches),
            load=pack_load(self.work, batches),
            encoders=tuple((name, *entry) for name, entry in zip(names, self.encoders)),
            number_format=number_format(layout.fp8, config.trainer.precision),
            ddp=model.ddp,
            overlap_messages=model.overlap_p2p_comm,
            all_stages_encode=model.encoder_placement == "all_stages",
        )

    def _sizes(self, layout: Layout, batches: BatchLayout) -> RunSizes:
        model, precision = layout.applied(self.config.model), self.config.trainer.precision
        key = (*layout[:2], layout.context_parallel_size, *layout[-2:])
        if key not in self._llamas:
            attention = planned_attention(model)
            self._llamas[key] = llama_sizes(model, precision, self.hf, attention=attention, on_cpu=False)
        reference = self.config.job == "dpo"
        return run_sizes(model, batches, self.hf, self._llamas[key], self.encoders, reference=reference)

    def examine(self, layout: Layout, bound: float) -> Candidate | Miss:
        """Count the memory of a layout and, if it fits, simulate its step.

        Args:
            bound: lower bound of its seconds.

        Raises:
            ConfigError: the layout does not divide the layers.
        """
        inputs = self.inputs(layout)
        options = least_that_fit(inputs.sizes, self.memory)
        if not options:
            return self._miss(layout, inputs, bound)
        step, recompute = min(
            ((step_time(inputs, recompute), recompute) for recompute in options), key=lambda both: both[0].seconds
        )
        return Candidate(layout, judge(inputs.sizes, recompute, self.memory), step, inputs)

    def _miss(self, layout: Layout, inputs: StepInputs, bound: float) -> Miss:
        most = candidates(inputs.sizes)[-1]
        # Stages after the second hold fewer micro-batches of as many layers.
        last = len(inputs.sizes.stages) - 1
        stages = {stage: held(inputs.sizes, stage, most) for stage in (0, min(1, last), last)}
        worst = max(stages, key=lambda stage: stages[stage].total)
        return Miss(layout, worst, stages[worst], bound)


@dataclass(frozen=True)
class _SizeGroup:
    """What the lower bounds of layouts with the same parallel sizes share: times without recomputation."""

    layer: PassTime
    first: PassTime
    last: PassTime
    message: float
    micro_batches: int
    layers: int

    @cached_property
    def _per_layer(self) -> tuple[float, float]:
        return self.layer.forward_total, self.layer.backward_total

    def bound(self, layout: Layout) -> float:
        """Seconds that no schedule can go below: a stage's own passes, after the first micro-batch has come through the
        stages before it, and before the last gradient has gone back through them."""
        stages, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
        first, middle, last = _layers(layout, self.layers)
        both = sum(self._per_layer)
        head, tail = sum(self.first), sum(self.last)
        own_first = self.micro_batches * (first * both + head + (tail if stages == 1 else 0.0))
        if stages == 1:
            return own_first
        # Before and after: the first chunk of each earlier stage, and a message there and back.
        before = first / chunks * both + head + 2 * self.message
        between = middle / chunks * both + 2 * self.message
        own_last = before + (stages - 2) * between + self.micro_batches * (last * both + tail)
        own_middle = before + (stages - 3) * between + self.micro_batches * middle * both if stages > 2 else 0.0
        return max(own_first, own_middle, own_last)


def _layers(layout: Layout, layers: int) -> tuple[int, int, int]:
    """Layers of the first, of a middle and of the last stage; the checks have passed."""
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    stages = layout.pipeline_model_parallel_size
    even = (layers - first - last) // max(1, stages - (first > 0) - (last > 0))
    return first or even, even, last or even


def search(problem: LayoutProblem, layouts: Sequence[Layout], wanted: int = 10, misses: int = 5) -> SearchResult:
    """Find the fastest layouts that fit.

    Args:
        wanted: number of combinations of parallel sizes and number format to find.
        misses: number of layouts that do not fit to name.
    """
    result = SearchResult(allowed=len(layouts))
    groups: dict[tuple[object, ...], _SizeGroup] = {}
    queue = []
    for number, layout in enumerate(layouts):
        key = _sizes_of(layout)
        if key not in groups:
            groups[key] = _group(problem, layout)
        queue.append((groups[key].bound(layout), number))
    best: dict[tuple[object, ...], Candidate] = {}
    missed: dict[tuple[object, ...], Miss] = {}
    for bound, number in sorted(queue):
        times = heapq.nsmallest(wanted, (candidate.step.seconds for candidate in best.values()))
        if len(times) == wanted and bound >= times[-1]:
            break
        layout, key = layouts[number], _sizes_of(layouts[number])
        if key in best and bound >= best[key].step.seconds:
            continue
        candidate = problem.examine(layout, bound)
        result.examined += 1
        if isinstance(candidate, Miss):
            if key not in missed or candidate.held.total < missed[key].held.total:
                missed[key] = candidate
            continue
        result.simulated += 1
        if key not in best or candidate.step.seconds < best[key].step.seconds:
            best[key] = candidate
    result.ranked = sorted(best.values(), key=lambda candidate: candidate.step.seconds)[:wanted]
    near = [miss for key, miss in missed.items() if key not in best]
    result.misses = sorted(near, key=lambda miss: miss.held.total)[:misses]
    return result


def _sizes_of(layout: Layout) -> tuple[object, ...]:
    """A layout without the split of its layers."""
    return (*layout[:5], *layout[7:])


def _group(problem: LayoutProblem, layout: Layout) -> _SizeGroup:
    inputs = problem.inputs(layout)
    llama, layers = inputs.sizes.llama, problem.hf.num_hidden_layers
    times = [layer_of(inputs, layer).whole for layer in llama.alike(range(layers))]
    return _SizeGroup(
        layer=min(times, key=lambda time: sum(time)),
        first=first_chunk_extra(inputs),
        last=last_chunk_extra(inputs),
        message=message_seconds(inputs) if layout.pipeline_model_parallel_size > 1 else 0.0,
        micro_batches=inputs.load.number,
        layers=layers,
    )
