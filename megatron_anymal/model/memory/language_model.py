"""What a rank of a run holds in memory, by arithmetic: sizes in, bytes out. Builds nothing and asks no machine.

What the Llama keeps of a forward pass for its backward is counted tensor by tensor; tests compare it with what autograd
keeps. media_memory.py does the same for encoders and projectors. A pack counts as full: of seq_length tokens, each with
a label.

Names in formulas: h hidden size, e bytes of a number, q this rank's tokens of a pack (all but for context parallelism),
own those of them outside attention and feed-forward (fewer under sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Elements of the logits that the head holds at once, and bytes of each: product, fp32, their gradient.
HEAD_CHUNK, HEAD_BYTES = 1 << 26, 10


@dataclass(frozen=True)
class Recompute:
    """What of a forward pass is done again in the backward pass, in megatron-core's terms.

    Attributes:
        granularity: "" (nothing), selective or full.
        modules: selective: core_attn, mlp.
        method, layers: full: block repeats the first `layers` layers of each model part, uniform all of them in chunks
            of `layers`.
    """

    granularity: str = ""
    modules: tuple[str, ...] = ()
    method: str = "block"
    layers: int = 1

    def repeated(self, layers: int) -> int:
        """How many of a model part's layers are repeated whole."""
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
        labels: of them with a label.
        queries, keys: tokens that scaled dot-product attention sees with its padding, where it is used.
    """

    tokens: int
    labels: int
    queries: int
    keys: int


@dataclass(frozen=True)
class LlamaSizes:
    """A Llama on one rank.

    Attributes:
        hidden, ffn, heads, groups, head_size, vocabulary: of the whole Llama, the vocabulary padded.
        number: bytes of a number.
        matrix_number: bytes of a number of the layers' matrices, with the copies that FP8 products make of them.
        adapted: with LoRA, per layer: linear layer -> which projections have an adapter. Linear layers are qkv, proj,
            fc1 and fc2; projections are named by their outputs: q, k, v, o, gate, up, down.
        attention: transformer_engine, flash_attn, flex or sdpa.
        on_cpu: where norms keep fp32 copies, and each layer its cosines and sines in 16 bits.
        fused_swiglu: it keeps its input alone.
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
    fused_swiglu: bool = True
    lora_r: int = 0
    lora_dropout: bool = False
    adapted: tuple[Mapping[str, tuple[str, ...]], ...] = ()

    @property
    def queries(self) -> int:
        """Channels of this rank's queries."""
        return self.heads * self.head_size // self.tensor

    @property
    def keys(self) -> int:
        """Channels of this rank's keys, and of its values."""
        return self.groups * self.head_size // self.tensor

    def own(self, tokens: int) -> int:
        """Tokens outside attention and feed-forward."""
        return tokens // self.tensor if self.sequence_parallel else tokens

    def inputs(self, linear: str) -> int:
        """Channels that a linear layer of this rank takes."""
        return {"qkv": self.hidden, "proj": self.queries, "fc1": self.hidden, "fc2": self.ffn // self.tensor}[linear]

    def outputs(self, linear: str) -> dict[str, int]:
        """Channels that it gives, by projection."""
        ffn = self.ffn // self.tensor
        return {
            "qkv": {"q": self.queries, "k": self.keys, "v": self.keys},
            "proj": {"o": self.hidden},
            "fc1": {"gate": ffn, "up": ffn},
            "fc2": {"down": self.hidden},
        }[linear]


LINEARS = ("qkv", "proj", "fc1", "fc2")


def matrix_parameters(llama: LlamaSizes) -> int:
    """Numbers of one layer's matrices on this rank, without adapters; two norms come on top."""
    return sum(llama.inputs(linear) * sum(llama.outputs(linear).values()) for linear in LINEARS)


def adapter_parameters(llama: LlamaSizes, layer: int) -> int:
    """Numbers of a layer's adapters on this rank."""
    if not llama.lora_r:
        return 0
    return llama.lora_r * sum(
        llama.inputs(linear) + llama.outputs(linear)[name]
        for linear, names in llama.adapted[layer].items()
        for name in names
    )


def vocabulary_parameters(llama: LlamaSizes) -> int:
    """Numbers of the embedding, or of the head, on this rank."""
    return llama.vocabulary // llama.tensor * llama.hidden


def kept_by_layer(llama: LlamaSizes, pack: Pack, layer: int, repeated: Sequence[str] = ()) -> dict[str, int]:
    """Bytes that one layer keeps for its backward pass, by what they are.

    Args:
        layer: its number in the whole Llama.
        repeated: modules that selective recompute does again.
    """
    e, h, q, own = llama.number, llama.hidden, pack.tokens, llama.own(pack.tokens)
    adapters = _adapters(llama, q, layer)
    kept = {"norms": 2 * _norm(llama, own)}
    # What a linear layer's own gradient, or its adapter's, needs: the layer's input.
    kept["input of qkv"] = e * own * h if llama.trains else 0
    kept |= {"attention": _attention(llama, pack, "core_attn" in repeated)}
    # Attention on GPUs gives out what it keeps; else its result is kept by itself, in the pack's order.
    copied = llama.attention == "sdpa" or "core_attn" in repeated
    kept["input of proj"] = e * q * llama.queries if llama.trains and copied else 0
    if adapters["proj"] and not copied and not llama.lora_dropout:
        adapters["proj"] -= e * q * llama.queries
    if "mlp" in repeated:
        kept["input of the feed-forward"] = e * own * h
        if llama.attention == "transformer_engine":
            # Its norm is a part of the feed-forward's first linear layer.
            kept["norms"] //= 2
        adapters["fc1"] = adapters["fc2"] = 0
    else:
        ffn = llama.ffn // llama.tensor
        kept["input of fc1"] = e * own * h if llama.trains else 0
        kept["gate and up"] = e * q * ffn * (2 if llama.fused_swiglu else 4)
        kept["input of fc2"] = e * q * ffn if llama.trains else 0
    kept["adapters"] = sum(adapters.values())
    return kept


def _norm(llama: LlamaSizes, own: int) -> int:
    if not llama.on_cpu:
        return own * (llama.number * llama.hidden + 4)
    # In fp32, and once more normalised where its gain trains.
    return 4 * own * (llama.hidden * (2 if llama.trains else 1) + 1)


def _attention(llama: LlamaSizes, pack: Pack, repeated: bool) -> int:
    e, q, k, heads = llama.number, llama.queries, llama.keys, llama.heads // llama.tensor
    if repeated:
        # Keys and values hold all that the linear layer gave; queries are a part of it, or a copy in another order.
        copied = llama.heads > llama.groups > llama.tensor
        return e * pack.tokens * ((q if copied else 0) + q + 2 * k)
    if llama.attention == "sdpa":
        turned = 4 * pack.tokens * llama.head_size * e if llama.on_cpu and e < 4 else 0
        return e * (2 * pack.queries * q + 2 * pack.keys * k) + 4 * pack.queries * heads + turned
    kept = e * pack.tokens * 2 * q + 4 * pack.tokens * heads
    if llama.attention == "transformer_engine":
        return kept + e * pack.tokens * 2 * k
    if llama.context > 1:
        return kept + e * pack.keys * 2 * k
    # Turned keys; the values lie in what the linear layer gave, which is held whole.
    return kept + e * pack.tokens * (k + q + 2 * k)


def _adapters(llama: LlamaSizes, tokens: int, layer: int) -> dict[str, int]:
    """Bytes that the adapters of each linear layer keep: their inputs, what lies between A and B, A and B joined."""
    kept = dict.fromkeys(LINEARS, 0)
    if not llama.lora_r:
        return kept
    e, own = llama.number, llama.own(tokens)
    for linear, names in llama.adapted[layer].items():
        column = linear in ("qkv", "fc1")
        taken, given = (own, tokens) if column else (tokens, own)
        inputs, width = llama.inputs(linear), llama.lora_r * len(names)
        if llama.lora_dropout:
            # For each projection what is left of the input, and a byte for what is not.
            kept[linear] = len(names) * taken * inputs * (e + 1)
        else:
            kept[linear] = e * (taken * inputs + inputs * width)
        kept[linear] += e * width * (given + sum(llama.outputs(linear).values()))
    return kept


def kept_by_layers(llama: LlamaSizes, pack: Pack, layers: Sequence[int], recompute: Recompute) -> int:
    """Bytes that the layers of one model part keep of one micro-batch."""
    modules = recompute.modules if recompute.granularity == "selective" else ()
    whole = recompute.repeated(len(layers))
    chunks = -(-whole // recompute.layers) if recompute.method == "uniform" else whole
    inputs = chunks * llama.number * llama.own(pack.tokens) * llama.hidden
    return inputs + sum(sum(kept_by_layer(llama, pack, layer, modules).values()) for layer in layers[whole:])


def kept_by_head(llama: LlamaSizes, pack: Pack) -> int:
    """Bytes that the last norm and the loss keep: rows of labelled positions, or where the head is frozen their
    gradients; indices, and sums of exponentials."""
    rows = pack.labels * (llama.number * llama.hidden + 8)
    return _norm(llama, llama.own(pack.tokens)) + rows + (pack.labels * 12 if llama.trains else 0)


def working(llama: LlamaSizes, pack: Pack, layers: Sequence[int], recompute: Recompute, last: bool) -> int:
    """Bytes in use for a while in the backward pass: what one unit makes again, and its gradients; or the head's."""
    e, ffn = llama.number, llama.ffn // llama.tensor
    again = 0
    if layers and recompute.granularity == "full":
        number = recompute.layers if recompute.method == "uniform" else 1
        again = number * sum(kept_by_layer(llama, pack, layers[0]).values())
    elif layers and recompute.modules:
        parts = [kept_by_layer(llama, pack, layers[0], modules) for modules in ((), recompute.modules)]
        again = max(0, sum(parts[0].values()) - sum(parts[1].values()))
    gradients = e * pack.tokens * (3 * ffn + 2 * llama.hidden)
    vocabulary = llama.vocabulary // llama.tensor
    head = HEAD_BYTES * min(HEAD_CHUNK, pack.labels * vocabulary) if last else 0
    head += 4 * vocabulary * llama.hidden if last and llama.trains else 0
    return max(again + gradients, head)


def peak(stage: int, stages: int, micro_batches: int, parts: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The most that one rank holds of its micro-batches at once, in megatron-core's 1F1B schedules.

    Args:
        parts: what each of its model parts holds of one micro-batch.

    Returns:
        The sum, and how many micro-batches each part has then.
    """
    if len(parts) == 1:
        number = min(micro_batches, stages - stage)
        return number * parts[0], (number,)
    groups = range(0, micro_batches, stages)
    order = [part for first in groups for part in range(len(parts)) for _ in range(min(stages, micro_batches - first))]
    warm_up = min(len(order), 2 * (stages - stage - 1) + (len(parts) - 1) * stages)
    alive, found = [0] * len(parts), (0, (0,) * len(parts))
    for number, part in enumerate(order):
        alive[part] += 1
        held = sum(count * size for count, size in zip(alive, parts))
        found = max(found, (held, tuple(alive)))
        if number >= warm_up:
            alive[len(parts) - 1 - order[number - warm_up]] -= 1
    return found


@dataclass(frozen=True)
class PipelineChunk:
    """A model part of a rank.

    Attributes:
        layers: their numbers in the whole Llama.
    """

    layers: tuple[int, ...]
    first: bool
    last: bool


@dataclass(frozen=True)
class MediaMemory:
    """What encoders and projectors add on the first stage (media_memory.py).

    Attributes:
        frozen, trainable: numbers.
        kept: bytes of a micro-batch for its backward pass.
        working: bytes in use for a while, and of media on their way.
    """

    frozen: int = 0
    trainable: int = 0
    kept: int = 0
    working: int = 0


@dataclass(frozen=True)
class RunSizes:
    """All that counts.

    Attributes:
        stages: the parts of a rank of each pipeline stage.
        micro_batches: of a step and replica, at most.
        optimizer_bytes: of each number that trains, over all ranks that share them.
        sharers: how many those are.
        reference: a frozen copy of the adapters is held (DPO).
    """

    llama: LlamaSizes
    pack: Pack
    stages: tuple[tuple[PipelineChunk, ...], ...]
    micro_batches: int
    optimizer_bytes: int
    sharers: int
    media: MediaMemory = field(default_factory=MediaMemory)
    reference: bool = False


@dataclass(frozen=True)
class Held:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    # Micro-batches that each model part holds activations of.
    in_flight: tuple[int, ...]

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def held(run: RunSizes, stage: int, recompute: Recompute) -> Held:
    """What a rank of a pipeline stage holds."""
    llama, pack, parts = run.llama, run.pack, run.stages[stage]
    frozen, trainable, copies, matrices, in_parts = 0, 0, 0, 0, []
    for part in parts:
        of_layers = len(part.layers) * matrix_parameters(llama)
        matrices += of_layers
        base = of_layers + len(part.layers) * 2 * llama.hidden
        tied = llama.tied and part.first and part.last
        base += (part.first + part.last - tied) * vocabulary_parameters(llama) + part.last * llama.hidden
        adapters = sum(adapter_parameters(llama, layer) for layer in part.layers)
        frozen += (0 if llama.trains else base) + part.first * run.media.frozen
        trainable += (base if llama.trains else 0) + adapters + part.first * run.media.trainable
        copies += adapters if run.reference else 0
        kept = kept_by_layers(llama, pack, part.layers, recompute)
        kept += part.first * run.media.kept
        # What a part sends on is held until its backward pass.
        kept += kept_by_head(llama, pack) if part.last else llama.number * llama.own(pack.tokens) * llama.hidden
        in_parts.append(kept)
    activations, in_flight = peak(stage, len(run.stages), run.micro_batches, in_parts)
    in_use = [
        max(working(llama, pack, part.layers, recompute, part.last), part.first * run.media.working) for part in parts
    ]
    return Held(
        weights=llama.number * (frozen + trainable + copies) + (llama.matrix_number - llama.number) * matrices,
        gradients=4 * trainable,
        optimizer=-(-run.optimizer_bytes * trainable // run.sharers),
        activations=activations,
        working=max(in_use),
        in_flight=in_flight,
    )
