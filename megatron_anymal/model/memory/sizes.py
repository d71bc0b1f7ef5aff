"""Sizes that a rank's memory use is computed from: its part of the Llama, its micro-batches and its parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import cache, cached_property


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
        added: marks and codes of discrete media in the whole vocabulary, with padding of their own.
        rows: which rows of the vocabulary train besides what `trains` says: `all`, `new` (those added) or `none`.
        tied: whether the head shares the embedding's weight.
        tensor: tensor-parallel size.
        context: context-parallel size.
        sequence_parallel: whether norms and residuals are split over the tensor-parallel ranks.
        number: bytes per element.
        matrix_number: bytes per element of the layers' matrices, including copies made for products in FP8 or NVFP4.
        dequantizes: whether a linear layer's products need a temporary copy of its matrix, of `number` bytes per
            element.
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
    matrix_number: float
    dequantizes: bool = False
    added: int = 0
    rows: str = "all"
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

    @property
    def vocabulary_trains(self) -> bool:
        """Whether the Llama's own rows of the embedding and the head train."""
        return self.trains and self.rows == "all"

    @property
    def added_trains(self) -> bool:
        """Whether there are rows of marks and codes that train."""
        return self.added > 0 and self.rows != "none"

    @property
    def head_trains(self) -> tuple[bool, ...]:
        """Whether each weight of the head trains: the Llama's rows and, if there are any, those added."""
        return (self.vocabulary_trains, *([self.added_trains] if self.added else []))

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
    """Parameters of the embedding, or of the head, on this rank, without those added."""
    return llama.vocabulary // llama.tensor * llama.hidden


def added_parameters(llama: LlamaSizes) -> int:
    """Parameters of the embedding's, or the head's, rows of marks and codes on this rank."""
    return llama.added // llama.tensor * llama.hidden


@dataclass(frozen=True)
class PipelineChunk:
    """A model chunk of a rank.

    Attributes:
        layers: their indices in the whole Llama.
        first: whether the chunk holds the embedding and the media modules.
        last: whether it holds the head.
        helps: whether its rank also holds encoders that work for the first stage.
    """

    layers: tuple[int, ...]
    first: bool
    last: bool
    helps: bool = False


@dataclass(frozen=True)
class MediaMemory:
    """Memory of encoders and projectors (see media.py), on the first stage unless stated otherwise.

    Attributes:
        frozen: number of frozen parameters.
        trainable: number of trainable parameters.
        kept: bytes that a micro-batch saves for its backward pass.
        working: temporary bytes, including media being copied.
        encoders: number of the encoders' parameters, which a stage that helps holds as well.
        encoding: temporary bytes of a stage that helps.
        features: bytes of a micro-batch's features, which the first stage holds from the end of the step before if
            other stages encode.
    """

    frozen: int = 0
    trainable: int = 0
    kept: int = 0
    working: int = 0
    encoders: int = 0
    encoding: int = 0
    features: int = 0


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
        base = matrices + len(chunk.layers) * 2 * llama.hidden + chunk.last * llama.hidden
        tables = chunk.first + chunk.last - (llama.tied and chunk.first and chunk.last)
        kinds = (
            (base, llama.trains),
            (tables * vocabulary_parameters(llama), llama.vocabulary_trains),
            (tables * added_parameters(llama), llama.added_trains),
        )
        adapters = sum(n * adapter_parameters(llama, layer) for layer, n in llama.alike(chunk.layers).items())
        return ChunkParameters(
            frozen=sum(number for number, trains in kinds if not trains)
            + chunk.first * self.media.frozen
            + chunk.helps * self.media.encoders,
            trainable=sum(number for number, trains in kinds if trains) + adapters + chunk.first * self.media.trainable,
            matrices=matrices,
            adapters=adapters,
        )
