"""Time of a training step under a layout: the pipeline's passes, then gradients, optimizer and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_anymal.config import DistributedDataParallelConfig, ModalityConfig
from megatron_anymal.model.memory.media import EncoderSizes
from megatron_anymal.model.memory.sizes import PipelineChunk, Recompute, RunSizes
from megatron_anymal.planning.layouts.collectives import Links
from megatron_anymal.planning.layouts.hardware import Hardware
from megatron_anymal.planning.layouts.layer_time import (
    LayerTime,
    PassTime,
    embedding_time,
    head_time,
    layer_time,
    media_time,
    spared_time,
    total,
)
from megatron_anymal.planning.layouts.rates import elementwise_seconds
from megatron_anymal.planning.layouts.simulation import PipelineTime, simulate
from megatron_anymal.planning.layouts.workload import PackLoad

# megatron-core's default number of parameters per gradient bucket, and its factor of the replicas.
_BUCKET, _BUCKET_PER_REPLICA = 40_000_000, 1_000_000


@dataclass(frozen=True)
class StepInputs:
    """All that the time of a step depends on.

    Attributes:
        gpu: the hardware.
        links: of the layout's groups.
        sizes: of the run on one rank, as for its memory.
        load: the mean micro-batch.
        encoders: name, section and sizes of each modality.
        number_format: of the linear layers: bf16, fp8 or fp32.
        ddp: `model.ddp`.
        overlap_messages: `model.overlap_p2p_comm`.
        all_stages_encode: whether `model.encoder_placement` is all_stages.
    """

    gpu: Hardware
    links: Links
    sizes: RunSizes
    load: PackLoad
    encoders: tuple[tuple[str, ModalityConfig, EncoderSizes], ...]
    number_format: str
    ddp: DistributedDataParallelConfig
    overlap_messages: bool
    all_stages_encode: bool = False


@dataclass(frozen=True)
class StepTime:
    """The parts of a step in seconds.

    Attributes:
        pipeline: passes and messages of all stages.
        forward: forward passes, per stage.
        reductions: exposed reduction of the gradients, per stage.
        update: optimizer and gathering of the updated weights.
        waits: communication inside the passes, per stage.
        seconds: the whole step.
    """

    pipeline: PipelineTime
    forward: tuple[float, ...]
    reductions: tuple[float, ...]
    update: float
    waits: tuple[float, ...]
    seconds: float

    @property
    def bubble(self) -> float:
        """Share of the step in which a stage waits for others, as a mean over the stages."""
        return self.pipeline.bubble * self.pipeline.seconds / self.seconds

    @property
    def exposed(self) -> float:
        """Share of the step that is communication which nothing hides, as a mean over the stages."""
        parts = zip(self.waits, self.pipeline.exchanging, self.reductions)
        return (sum(map(sum, parts)) / len(self.waits)) / self.seconds


def step_time(inputs: StepInputs, recompute: Recompute, *, timeline: bool = False) -> StepTime:
    """Estimate one step.

    Args:
        timeline: also keep the spans of every stage.
    """
    stages = [[_chunk_time(inputs, chunk, recompute) for chunk in chunks] for chunks in inputs.sizes.stages]
    passes = [[(chunk.forward_total, chunk.backward_total) for chunk in chunks] for chunks in stages]
    number = inputs.load.number
    pipeline = simulate(passes, number, message_seconds(inputs), overlap=inputs.overlap_messages, timeline=timeline)
    reductions, updates = [], []
    for chunks, times in zip(inputs.sizes.stages, stages):
        trainable = trainable_parameters(inputs.sizes, chunks)
        reductions.append(_reduction(inputs, trainable, sum(time.backward_total for time in times)))
        updates.append(_update(inputs, trainable))
    waits = tuple(number * sum(t.forward_wait + t.backward_wait for t in times) for times in stages)
    forward = tuple(number * sum(time.forward_total for time in times) for times in stages)
    last = max(end + reduction for end, reduction in zip(pipeline.ends, reductions)) + late_encoding(inputs, pipeline)
    return StepTime(pipeline, forward, tuple(reductions), max(updates), waits, last + max(updates))


def message_seconds(inputs: StepInputs) -> float:
    """Seconds of one message between neighbouring stages: a micro-batch's hidden states on this rank."""
    llama, tokens = inputs.sizes.llama, inputs.load.tokens
    return inputs.links.pipeline.send(llama.number * llama.own(tokens // llama.context) * llama.hidden)


def layer_of(inputs: StepInputs, layer: int) -> LayerTime:
    """Time of one layer, cached over layouts that share its sizes."""
    return layer_time(inputs.gpu, inputs.links, inputs.sizes.llama, inputs.load, layer, inputs.number_format)


def first_chunk_extra(inputs: StepInputs) -> PassTime:
    """What the first stage computes besides its layers. If all stages encode, `late_encoding` counts the encoders."""
    shared = (inputs.gpu, inputs.links, inputs.sizes.llama, inputs.load)
    media = media_time(*shared, inputs.encoders, inputs.number_format, encode=not inputs.all_stages_encode)
    return embedding_time(*shared).plus(media)


def late_encoding(inputs: StepInputs, pipeline: PipelineTime) -> float:
    """Seconds of encoding on all stages that do not fit into the waits of the pipeline (data/stage_shares.py)."""
    if not inputs.all_stages_encode:
        return 0.0
    shared = (inputs.gpu, inputs.links, inputs.sizes.llama, inputs.load, inputs.encoders, inputs.number_format)
    encoders = media_time(*shared).forward - media_time(*shared, encode=False).forward
    stages, chunks, number = len(pipeline.busy), len(inputs.sizes.stages[0]), inputs.load.number
    slot = sum(pipeline.busy) / stages / number / chunks
    return max(0.0, number * encoders - slot * sum(range(stages))) / stages


def last_chunk_extra(inputs: StepInputs) -> PassTime:
    """What the last stage computes besides its layers, less what its last layer spares."""
    shared = (inputs.gpu, inputs.links, inputs.sizes.llama, inputs.load)
    last = inputs.sizes.stages[-1][-1].layers[-1]
    spared = spared_time(*shared, last, inputs.number_format)
    return head_time(*shared, inputs.number_format).plus(spared.times(-1))


def _chunk_time(inputs: StepInputs, chunk: PipelineChunk, recompute: Recompute) -> PassTime:
    whole = recompute.repeated(len(chunk.layers))
    parts = []
    for number, layer in enumerate(chunk.layers):
        time = layer_of(inputs, layer)
        parts.append(time.whole)
        parts.append(PassTime(backward=_repeated(time, recompute, number < whole)))
    parts += [first_chunk_extra(inputs)] * chunk.first + [last_chunk_extra(inputs)] * chunk.last
    return total(parts)


def _repeated(time: LayerTime, recompute: Recompute, whole: bool) -> float:
    """Seconds of a layer's forward pass that its backward pass repeats."""
    if whole:
        return time.whole.forward_total
    if recompute.granularity != "selective":
        return 0.0
    modules = {"core_attn": time.attention, "mlp": time.mlp}
    return sum(modules[name].forward_total for name in recompute.modules if name in modules)


def trainable_parameters(sizes: RunSizes, chunks: Sequence[PipelineChunk]) -> int:
    """Trainable parameters of a rank of a stage."""
    return sum(sizes.parameters(chunk).trainable for chunk in chunks)


def _reduction(inputs: StepInputs, trainable: int, backward: float) -> float:
    """Seconds of the reduction of fp32 gradients over the replicas after the stage's last backward pass.

    With `overlap_grad_reduce` all buckets but the last are reduced during that pass, as far as it lasts.
    """
    link = inputs.links.data
    size = 4.0 * trainable
    seconds = link.gather(size) if inputs.ddp.use_distributed_optimizer else link.reduce(size)
    if not inputs.ddp.overlap_grad_reduce or not trainable:
        return seconds
    bucket = inputs.ddp.bucket_size or max(_BUCKET, _BUCKET_PER_REPLICA * link.ranks)
    hidden = seconds * max(0.0, 1 - bucket / trainable)
    return seconds - min(hidden, backward)


def _update(inputs: StepInputs, trainable: int) -> float:
    """Seconds of the gradient's norm, of AdamW and of the gathering of the updated weights.

    AdamW reads and writes the optimizer state, reads the gradient and writes the model's weight.
    """
    sizes, number = inputs.sizes, inputs.sizes.llama.number
    own = trainable / sizes.sharers
    moved = own * (2 * sizes.optimizer_bytes + 2 * 4 + number)
    gathered = inputs.links.data.gather(float(number * trainable)) if inputs.ddp.use_distributed_optimizer else 0.0
    if inputs.ddp.overlap_param_gather:
        # The next forward pass waits for the first of its buckets only.
        gathered *= min(1.0, _BUCKET / max(1, trainable))
    return elementwise_seconds(inputs.gpu, moved, kernels=4) + gathered
