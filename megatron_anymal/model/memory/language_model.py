"""Compute a rank's memory use from sizes alone, without building a model or querying a machine.

The activations that the Llama saves for its backward pass are counted tensor by tensor; tests compare the result with
what autograd saves. media.py does the same for encoders and projectors. A pack is assumed to be full: seq_length
tokens, each with a label.

Names in formulas: h hidden size, e bytes per element, q this rank's tokens of a pack (all of them without context
parallelism), own those tokens outside attention and feed-forward (fewer under sequence parallelism).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import cache, cached_property

# Logits that the head holds at a time, and bytes of each: matrix product, fp32 copy, gradient.
HEAD_CHUNK, HEAD_BYTES = 1 << 26, 10


@dataclass(frozen=True)
class Recompute:
    """Activation recomputation settings, in megatron-core's terms.

    Attributes:
        granularity: "" (nothing), selective or full.
        modules: for selective: core_attn, mlp.
        method: for full: block recomputes the first `layers` layers of each model chunk, uniform all of them in groups
            of `layers`.
        layers: for full: see `method`.
    """

    granularity: str = ""
    modules: tuple[str, ...] = ()
    method: str = "block"
    layers: int = 1

    def repeated(self, layers: int) -> int:
        """Return how many of a model chunk's layers are fully recomputed."""
        if self.granularity != "full":
            return 0
        return layers if self.method == "uniform" else min(self.layers, layers)

    def __str__(self) -> str:
        if self.granularity == "selective":
            return f"selective: {', '.join(self.modules)}"
        if self.granularity == "full":
            return f"full: {self.method}, {self.layers} layer(s)"
        return "none"


@dataclass(frozen=True)
class Pack:
    """One micro-batch.

    Attributes:
        tokens: on this rank.
        labels: number of these tokens that have a label.
        queries: tokens whose queries scaled dot-product attention processes, including its padding, if it is used.
        keys: tokens whose keys it processes, likewise.
    """

    tokens: int
    labels: int
    queries: int
    keys: int


@dataclass(frozen=True)
class LlamaSizes:
    """Sizes of a Llama on one rank.

    Attributes:
        hidden: hidden size.
        ffn: width of the feed-forward in the whole Llama.
        heads: attention heads of the whole Llama.
        groups: key/value heads of the whole Llama.
        head_size: channels per head.
        vocabulary: entries of the whole vocabulary, with padding.
        tied: whether the head shares the embedding's weight.
        tensor: tensor-parallel size.
        context: context-parallel size.
        sequence_parallel: whether norms and residuals are split over the tensor-parallel ranks.
        number: bytes per element.
        matrix_number: bytes per element of the layers' matrices, including copies made for FP8 products.
        trains: whether the Llama's own weights train.
        lora_r: rank of the adapters; 0 without LoRA.
        lora_dropout: whether the adapters' inputs are dropped out.
        adapted: with LoRA, per layer: pairs of a linear layer and its projections with an adapter. Linear layers are
            qkv, proj, fc1 and fc2; projections are named by their outputs: q, k, v, o, gate, up, down.
        attention: transformer_engine, flash_attn, flex or sdpa.
        on_cpu: whether the run is on a CPU.
    """

    hidden: int
    ffn: int
    heads: int
    groups: int
    head_size: int
    vocabulary: int
    tied: bool
    tensor: int
    context: int
    sequence_parallel: bool
    number: int
    trains: bool
    attention: str
    on_cpu: bool
    matrix_number: int
    lora_r: int = 0
    lora_dropout: bool = False
    adapted: tuple[tuple[tuple[str, tuple[str, ...]], ...], ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # The layout search looks up what layers keep millions of times.
        return hash(astuple(self))

    def alike(self, layers: Sequence[int]) -> Counter[int]:
        """Count layers that have the same adapters, each kind by the first layer of the Llama that has them."""
        if not self.adapted:
            return Counter({0: len(layers)}) if layers else Counter()
        return Counter(self._first_alike[layer] for layer in layers)

    @cached_property
    def _first_alike(self) -> tuple[int, ...]:
        return tuple(self.adapted.index(adapters) for adapters in self.adapted)

    @property
    def queries(self) -> int:
        """Channels of this rank's queries."""
        return self.heads * self.head_size // self.tensor

    @property
    def keys(self) -> int:
        """Channels of this rank's keys; its values have as many."""
        return self.groups * self.head_size // self.tensor

    def own(self, tokens: int) -> int:
        """Tokens outside attention and feed-forward."""
        return tokens // self.tensor if self.sequence_parallel else tokens

    def inputs(self, linear: str) -> int:
        """Input channels of a linear layer on this rank."""
        return {"qkv": self.hidden, "proj": self.queries, "fc1": self.hidden, "fc2": self.ffn // self.tensor}[linear]

    def outputs(self, linear: str) -> dict[str, int]:
        """Output channels of a linear layer on this rank, by projection."""
        ffn = self.ffn // self.tensor
        return {
            "qkv": {"q": self.queries, "k": self.keys, "v": self.keys},
            "proj": {"o": self.hidden},
            "fc1": {"gate": ffn, "up": ffn},
            "fc2": {"down": self.hidden},
        }[linear]


LINEARS = ("qkv", "proj", "fc1", "fc2")


@cache
def matrix_parameters(llama: LlamaSizes) -> int:
    """Parameters of one layer's matrices on this rank, without adapters and the two norms."""
    return sum(llama.inputs(linear) * sum(llama.outputs(linear).values()) for linear in LINEARS)


@cache
def adapter_parameters(llama: LlamaSizes, layer: int) -> int:
    """Parameters of a layer's adapters on this rank."""
    if not llama.lora_r:
        return 0
    return llama.lora_r * sum(
        llama.inputs(linear) + llama.outputs(linear)[name] for linear, names in llama.adapted[layer] for name in names
    )


def vocabulary_parameters(llama: LlamaSizes) -> int:
    """Parameters of the embedding, or of the head, on this rank."""
    return llama.vocabulary // llama.tensor * llama.hidden


def kept_by_layer(llama: LlamaSizes, pack: Pack, layer: int, repeated: Sequence[str] = ()) -> dict[str, int]:
    """Bytes that one layer saves for its backward pass, by category.

    Args:
        layer: its index in the whole Llama.
        repeated: modules that selective recomputation recomputes.
    """
    e, h, q, own = llama.number, llama.hidden, pack.tokens, llama.own(pack.tokens)
    adapters = _adapters(llama, q, layer)
    kept = {"norms": 2 * _norm(llama, own)}
    # The weight gradient of a linear layer, or of its adapter, needs the layer's input.
    kept["input of qkv"] = e * own * h if llama.trains else 0
    kept |= {"attention": _attention(llama, pack, "core_attn" in repeated)}
    # Attention on GPUs saves its output anyway; otherwise the output is saved separately, in pack order.
    copied = llama.attention == "sdpa" or "core_attn" in repeated
    kept["input of proj"] = e * q * llama.queries if llama.trains and copied else 0
    if adapters["proj"] and not copied and not llama.lora_dropout:
        adapters["proj"] -= e * q * llama.queries
    if "mlp" in repeated:
        kept["input of the feed-forward"] = e * own * h
        if llama.attention == "transformer_engine":
            # The norm is fused into the feed-forward's first linear layer.
            kept["norms"] //= 2
        adapters["fc1"] = adapters["fc2"] = 0
    else:
        ffn = llama.ffn // llama.tensor
        kept["input of fc1"] = e * own * h if llama.trains else 0
        kept["gate and up"] = e * q * ffn * 2
        kept["input of fc2"] = e * q * ffn if llama.trains else 0
    kept["adapters"] = sum(adapters.values())
    return kept


def _norm(llama: LlamaSizes, own: int) -> int:
    """The input, and in fp32 its scale."""
    return own * (llama.number * llama.hidden + 4)


def _attention(llama: LlamaSizes, pack: Pack, repeated: bool) -> int:
    e, q, k, heads = llama.number, llama.queries, llama.keys, llama.heads // llama.tensor
    if repeated:
        # Keys and values are views that hold the linear layer's whole output; queries are a view too, or a reordered
        # copy.
        copied = llama.heads > llama.groups > llama.tensor
        return e * pack.tokens * ((q if copied else 0) + q + 2 * k)
    if llama.attention == "sdpa":
        return e * (2 * pack.queries * q + 2 * pack.keys * k) + 4 * pack.queries * heads
    kept = e * pack.tokens * 2 * q + 4 * pack.tokens * heads
    if llama.attention == "transformer_engine":
        return kept + e * pack.tokens * 2 * k
    if llama.context > 1:
        return kept + e * pack.keys * 2 * k
    # Rotated keys; the values are views of the linear layer's output, which is held as a whole.
    return kept + e * pack.tokens * (k + q + 2 * k)


def _adapters(llama: LlamaSizes, tokens: int, layer: int) -> dict[str, int]:
    """Bytes that the adapters of each linear layer save: their inputs, the output of A, and A and B fused."""
    kept = dict.fromkeys(LINEARS, 0)
    if not llama.lora_r:
        return kept
    e, own = llama.number, llama.own(tokens)
    for linear, names in llama.adapted[layer]:
        column = linear in ("qkv", "fc1")
        tokens_in, tokens_out = (own, tokens) if column else (tokens, own)
        inputs, width = llama.inputs(linear), llama.lora_r * len(names)
        if llama.lora_dropout:
            # Per projection the input after dropout, and a mask of one byte per element.
            kept[linear] = len(names) * tokens_in * inputs * (e + 1)
        else:
            kept[linear] = e * (tokens_in * inputs + inputs * width)
        kept[linear] += e * width * (tokens_out + sum(llama.outputs(linear).values()))
    return kept


def kept_by_layers(llama: LlamaSizes, pack: Pack, layers: Sequence[int], recompute: Recompute) -> int:
    """Bytes that the layers of one model chunk save per micro-batch."""
    modules = recompute.modules if recompute.granularity == "selective" else ()
    whole = recompute.repeated(len(layers))
    chunks = -(-whole // recompute.layers) if recompute.method == "uniform" else whole
    inputs = chunks * llama.number * llama.own(pack.tokens) * llama.hidden
    kinds = llama.alike(layers[whole:]).items()
    return inputs + sum(number * _kept_in_total(llama, pack, layer, modules) for layer, number in kinds)


@cache
def _kept_in_total(llama: LlamaSizes, pack: Pack, layer: int, modules: tuple[str, ...] = ()) -> int:
    return sum(kept_by_layer(llama, pack, layer, modules).values())


def kept_by_head(llama: LlamaSizes, pack: Pack) -> int:
    """Bytes that the last norm and the loss save: the hidden states of labeled positions (their gradients if the head
    is frozen), indices and log-sum-exps."""
    rows = pack.labels * (llama.number * llama.hidden + 8)
    return _norm(llama, llama.own(pack.tokens)) + rows + (pack.labels * 12 if llama.trains else 0)


def working(llama: LlamaSizes, pack: Pack, layers: Sequence[int], recompute: Recompute, last: bool) -> int:
    """Temporary bytes of the backward pass: one unit's recomputed activations and gradients, or those of the head."""
    e, ffn = llama.number, llama.ffn // llama.tensor
    recomputed = 0
    if layers and recompute.granularity == "full":
        number = recompute.layers if recompute.method == "uniform" else 1
        recomputed = number * _kept_in_total(llama, pack, layers[0])
    elif layers and recompute.modules:
        kept = _kept_in_total(llama, pack, layers[0]), _kept_in_total(llama, pack, layers[0], recompute.modules)
        recomputed = max(0, kept[0] - kept[1])
    gradients = e * pack.tokens * (3 * ffn + 2 * llama.hidden)
    vocabulary = llama.vocabulary // llama.tensor
    head = HEAD_BYTES * min(HEAD_CHUNK, pack.labels * vocabulary) if last else 0
    head += 4 * vocabulary * llama.hidden if last and llama.trains else 0
    return max(recomputed + gradients, head)


def peak(stage: int, stages: int, micro_batches: int, parts: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Peak activation memory of a rank under megatron-core's 1F1B schedules.

    Args:
        parts: bytes that each of its model chunks holds per micro-batch.

    Returns:
        The peak, and the number of micro-batches in flight per chunk at that point.
    """
    if len(parts) == 1:
        number = min(micro_batches, stages - stage)
        return number * parts[0], (number,)
    if micro_batches % stages == 0:
        # The order repeats after each group of micro-batches, and the warm-up ends within two groups.
        micro_batches = min(micro_batches, 4 * stages)
    groups = range(0, micro_batches, stages)
    order = [
        chunk for first in groups for chunk in range(len(parts)) for _ in range(min(stages, micro_batches - first))
    ]
    warm_up = min(len(order), 2 * (stages - stage - 1) + (len(parts) - 1) * stages)
    alive, highest = [0] * len(parts), (0, (0,) * len(parts))
    for number, chunk in enumerate(order):
        alive[chunk] += 1
        held = sum(count * size for count, size in zip(alive, parts))
        highest = max(highest, (held, tuple(alive)))
        if number >= warm_up:
            alive[len(parts) - 1 - order[number - warm_up]] -= 1
    return highest


@dataclass(frozen=True)
class PipelineChunk:
    """A model chunk of a rank.

    Attributes:
        layers: their indices in the whole Llama.
        first: whether the chunk holds the embedding and the media modules.
        last: whether it holds the head.
    """

    layers: tuple[int, ...]
    first: bool
    last: bool


@dataclass(frozen=True)
class MediaMemory:
    """Memory of encoders and projectors on the first stage (see media.py).

    Attributes:
        frozen: number of frozen parameters.
        trainable: number of trainable parameters.
        kept: bytes that a micro-batch saves for its backward pass.
        working: temporary bytes, including media being copied.
    """

    frozen: int = 0
    trainable: int = 0
    kept: int = 0
    working: int = 0


@dataclass(frozen=True)
class ChunkParameters:
    """Parameters of a model chunk of one rank."""

    # Those that are frozen.
    frozen: int
    # Those that train.
    trainable: int
    # Those in the layers' matrices, trained or not.
    matrices: int
    # Those of adapters.
    adapters: int


@dataclass(frozen=True)
class RunSizes:
    """All sizes of a run that affect its memory use.

    Attributes:
        llama: sizes of the Llama on one rank.
        pack: sizes of a micro-batch.
        stages: a rank's model chunks, per pipeline stage.
        micro_batches: maximum per step and replica.
        optimizer_bytes: per trainable parameter, over all ranks that share the optimizer state.
        sharers: number of those ranks.
        media: memory of encoders and projectors.
        reference: whether a frozen copy of the adapters is held (DPO).
    """

    llama: LlamaSizes
    pack: Pack
    stages: tuple[tuple[PipelineChunk, ...], ...]
    micro_batches: int
    optimizer_bytes: int
    sharers: int
    media: MediaMemory = field(default_factory=MediaMemory)
    reference: bool = False

    @cached_property
    def chunk_lengths(self) -> frozenset[tuple[int, ...]]:
        """The different numbers of layers that a stage's chunks have."""
        return frozenset(tuple(len(chunk.layers) for chunk in chunks) for chunks in self.stages)

    def parameters(self, chunk: PipelineChunk) -> ChunkParameters:
        """Count the parameters of a model chunk of one rank."""
        llama = self.llama
        matrices = len(chunk.layers) * matrix_parameters(llama)
        base = matrices + len(chunk.layers) * 2 * llama.hidden
        tied = llama.tied and chunk.first and chunk.last
        base += (chunk.first + chunk.last - tied) * vocabulary_parameters(llama) + chunk.last * llama.hidden
        adapters = sum(n * adapter_parameters(llama, layer) for layer, n in llama.alike(chunk.layers).items())
        return ChunkParameters(
            frozen=(0 if llama.trains else base) + chunk.first * self.media.frozen,
            trainable=(base if llama.trains else 0) + adapters + chunk.first * self.media.trainable,
            matrices=matrices,
            adapters=adapters,
        )


@dataclass(frozen=True)
class Held:
    """Memory use of one rank, in bytes."""

    # Weights, including a reference's adapters and copies for FP8 products.
    weights: int
    # fp32 gradients.
    gradients: int
    # This rank's share of the optimizer state.
    optimizer: int
    # Activations saved for backward passes, at their peak.
    activations: int
    # Temporary tensors.
    working: int
    # Micro-batches whose activations each model chunk holds.
    in_flight: tuple[int, ...]

    @property
    def total(self) -> int:
        """Sum of all categories."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def kept_by_chunk(run: RunSizes, chunk: PipelineChunk, recompute: Recompute) -> int:
    """Bytes that a model chunk holds per micro-batch from its forward to its backward pass."""
    llama, pack = run.llama, run.pack
    kept = kept_by_layers(llama, pack, chunk.layers, recompute) + chunk.first * run.media.kept
    # A chunk's output is held until its backward pass.
    return kept + (kept_by_head(llama, pack) if chunk.last else llama.number * llama.own(pack.tokens) * llama.hidden)


def held(run: RunSizes, stage: int, recompute: Recompute) -> Held:
    """Compute the memory use of a rank of a pipeline stage."""
    llama, pack, chunks = run.llama, run.pack, run.stages[stage]
    counts = [run.parameters(chunk) for chunk in chunks]
    frozen, trainable = sum(count.frozen for count in counts), sum(count.trainable for count in counts)
    copies = sum(count.adapters for count in counts) if run.reference else 0
    matrices = sum(count.matrices for count in counts)
    kept = [kept_by_chunk(run, chunk, recompute) for chunk in chunks]
    activations, in_flight = peak(stage, len(run.stages), run.micro_batches, kept)
    in_use = [
        max(working(llama, pack, chunk.layers, recompute, chunk.last), chunk.first * run.media.working)
        for chunk in chunks
    ]
    return Held(
        weights=llama.number * (frozen + trainable + copies) + (llama.matrix_number - llama.number) * matrices,
        gradients=4 * trainable,
        optimizer=-(-run.optimizer_bytes * trainable // run.sharers),
        activations=activations,
        working=max(in_use),
        in_flight=in_flight,
    )
