"""Layouts of the parity suite.

Pre-training: a selection that covers every valid pair of settings. SFT and DPO: lists that cover every setting.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_anymal.config import NeftuneConfig, RunConfig

MOST_PROCESSES = 8
# Decoder layers of the Llama in parity.data; a layout may have fewer.
LAYERS = 8
# Layouts of the SFT run that a DPO run starts from.
STARTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2-sp": {"tensor": 2, "sequence": True},
    "pp2-cp2": {"pipeline": 2, "context": 2},
}
# Fields that determine a run's results. All others change only the layout.
_DECIDES = ("media", "trains", "tied_head", "job", "noise", "mean", "smoothing", "start", "layers", "rows")


@dataclass(frozen=True)
class Layout:
    """Settings of one run: parallel layout, data and trained weights."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    recompute: str = ""
    # A key of parity.data.MEDIA.
    media: str = "mixed"
    # Trained weights of the Llama: none ("frozen"), adapters ("lora"), some ("partial") or all ("full"). Projectors and
    # the IMU encoder train too, except in DPO.
    trains: str = "frozen"
    # Fewer layers on the first stage.
    uneven: bool = False
    # Overlap gradient reduction and weight gathering with the forward and backward passes.
    overlap: bool = False
    # Send and receive between pipeline stages in batches, instead of overlapped; virtual pipelines only.
    batched_messages: bool = False
    distributed_optimizer: bool = True
    tied_head: bool = False
    # Packs per forward pass (the micro-batch size).
    packs: int = 1
    # pretrain, sft or dpo. DPO trains only the adapters.
    job: str = "pretrain"
    # NEFTune noise: none, on "all" embeddings, or only on "text" embeddings.
    noise: str = ""
    # The loss is averaged over each "token" or each "sample".
    mean: str = "token"
    # DPO only; `start` is one of STARTS.
    smoothing: float = 0.05
    reference: str = "recomputed"
    start: str = "one"
    # DPO only: model.dpo.share_prompt. By default the prompt is shared in runs without noise.
    share: str = "auto"
    # Decoder layers of the Llama.
    layers: int = LAYERS
    # Documents with marks and codes of discrete media, and which rows train (model.discrete_rows); "": text only.
    rows: str = ""

    @property
    def shallow(self) -> Layout:
        """The same layout with half the layers, unless its pipeline needs all of them."""
        deep = self.uneven or self.pipeline * self.virtual > LAYERS // 2
        return self if deep else replace(self, layers=LAYERS // 2)

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def alone(self) -> Layout:
        """The same run on one process."""
        return Layout(**{name: getattr(self, name) for name in _DECIDES})

    @property
    def sft(self) -> Layout:
        """Layout of the SFT run that this DPO run starts from."""
        settings = {"job": "sft", "trains": "lora", "noise": "all", **STARTS[self.start]}
        return Layout(media=self.media, tied_head=self.tied_head, layers=self.layers, **settings)

    @property
    def name(self) -> str:
        """Short name for tables and test ids."""
        parallel = [
            f"{short}{getattr(self, field)}"
            for short, field in (("tp", "tensor"), ("pp", "pipeline"), ("vpp", "virtual"), ("cp", "context"))
            if getattr(self, field) > 1
        ]
        if self.sequence:
            parallel.insert(1, "sp")
        if self.data > 1:
            parallel.append(f"dp{self.data}")
        marks = [
            mark
            for mark, on in (
                (self.recompute, self.recompute),
                ("uneven", self.uneven),
                ("overlap", self.overlap),
                ("batched", self.batched_messages),
                ("plain-optimizer", not self.distributed_optimizer),
                ("tied", self.tied_head),
                ("two-packs", self.packs > 1),
                (f"noise-{self.noise}", self.noise),
                ("by-sample", self.mean == "sample"),
                ("sure", self.smoothing == 0),
                (self.reference, self.reference == "cached"),
                (f"from-{self.start}", self.start != "one"),
                (f"share-{self.share}", self.share != "auto"),
                (f"rows-{self.rows}", self.rows),
            )
            if on
        ]
        if self.job != "pretrain":
            parallel.insert(0, self.job if parallel else f"{self.job}-one")
        return "-".join([*(parallel or ["one"]), *marks, self.media.replace(" ", "-"), self.trains])

    @property
    def possible(self) -> bool:
        """Whether the settings are compatible and need at most MOST_PROCESSES processes."""
        return (
            self.processes <= MOST_PROCESSES
            and (self.tensor > 1 or not self.sequence)
            and (self.pipeline > 1 or (self.virtual == 1 and not self.uneven))
            # Two stages of 2 and 6 layers, in one or two virtual chunks. More stages allow no uneven split of 8 layers.
            and (not self.uneven or self.pipeline == 2)
            and (self.distributed_optimizer or not self.overlap)
            # With two stages megatron-core confuses the messages (config/layout_validation.py).
            and (not self.batched_messages or (self.virtual > 1 and self.pipeline > 2))
            and (self.trains == "lora" or self.job != "dpo")
        )

    def applied(self, base: RunConfig) -> RunConfig:
        """Return a copy of `base` with this layout applied."""
        config = copy.deepcopy(base)
        config.trainer.devices = self.processes
        model = config.model
        model.neftune = NeftuneConfig(alpha=5.0 if self.noise else 0.0, embeddings=self.noise or "all")
        model.loss_normalization = self.mean
        if self.job == "dpo":
            model.dpo.label_smoothing, model.dpo.reference = self.smoothing, self.reference
            model.dpo.share_prompt = self.share
        model.tensor_model_parallel_size, model.sequence_parallel = self.tensor, self.sequence
        model.pipeline_model_parallel_size = self.pipeline
        model.virtual_pipeline_model_parallel_size = self.virtual
        model.overlap_p2p_comm = not self.batched_messages
        model.context_parallel_size = self.context
        model.language_model.config["num_hidden_layers"] = self.layers
        model.recompute_granularity, model.micro_batch_size = self.recompute, self.packs
        if self.uneven:
            model.num_layers_in_first_pipeline_stage = self.layers // 4
            model.num_layers_in_last_pipeline_stage = self.layers - self.layers // 4
        model.ddp.use_distributed_optimizer = self.distributed_optimizer
        model.ddp.overlap_grad_reduce = model.ddp.overlap_param_gather = self.overlap
        # Small buckets, so that several reductions are in flight at once, and a large weight has one of its own.
        model.ddp.bucket_size = 100 if self.overlap else 0
        return config


CHOICES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2, 4),
    "sequence": (False, True),
    "pipeline": (1, 2, 4),
    "virtual": (1, 2),
    "context": (1, 2, 4),
    "data": (1, 2),
    "recompute": ("", "full", "selective"),
    "media": ("image", "video", "audio", "imu", "text", "mixed", "few media"),
    "trains": ("frozen", "lora", "partial", "full"),
}
# Options outside the pairwise cover; the selected layouts cycle through them.
TURNS: tuple[dict[str, Any], ...] = (
    {},
    {"overlap": True},
    {"tied_head": True},
    {"uneven": True},
    {"distributed_optimizer": False},
    {"packs": 2},
    {"overlap": True, "tied_head": True},
)

Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(layout: Layout) -> frozenset[Pair]:
    """Return every pair of settings in a layout."""
    return frozenset(itertools.combinations(((name, getattr(layout, name)) for name in CHOICES), 2))


def possible_layouts() -> Iterator[Layout]:
    """Yield every valid combination of CHOICES."""
    for values in itertools.product(*CHOICES.values()):
        layout = Layout(**dict(zip(CHOICES, values)))
        if layout.possible:
            yield layout


def cover(count: int) -> list[Layout]:
    """Return at least `count` layouts that cover every valid pair of settings. Deterministic.

    Greedy: always add the layout with the most pairs not covered yet. Ties go to the layout whose pairs were used
    least. Once all pairs are covered, layouts on the most processes come first.
    """
    left = {layout: pairs_of(layout) for layout in possible_layouts()}
    missing = set(frozenset().union(*left.values()))
    used = dict.fromkeys(missing, 0)
    chosen: list[Layout] = []
    while missing or len(chosen) < count:
        best = max(
            left,
            key=lambda layout: (
                len(left[layout] & missing),
                layout.processes if not missing else 0,
                -sum(used[pair] for pair in left[layout]),
            ),
        )
        pairs = left.pop(best)
        missing -= pairs
        for pair in pairs:
            used[pair] += 1
        chosen.append(_with_turn(best, len(chosen)))
    return chosen


_LORA = Layout(trains="lora", noise="all")
SFT = tuple(
    replace(_LORA, job="sft", **settings)
    for settings in (
        {"tensor": 2},
        {"pipeline": 2, "uneven": True, "packs": 2},
        {"context": 2, "recompute": "selective", "distributed_optimizer": False},
        {"tensor": 2, "sequence": True, "recompute": "full", "media": "image", "noise": "text", "mean": "sample"},
        {"tensor": 2, "pipeline": 2, "virtual": 2, "context": 2, "media": "image", "noise": "text", "mean": "sample"},
        {"data": 2, "overlap": True, "media": "few media", "trains": "full", "noise": "text", "mean": "sample"},
        {
            **{"pipeline": 2, "virtual": 2, "data": 2, "overlap": True, "recompute": "selective"},
            **{"media": "few media", "trains": "full", "noise": "text", "mean": "sample"},
        },
        {"context": 4, "media": "video", "noise": "", "mean": "sample"},
        {"tensor": 2, "sequence": True, "context": 2, "data": 2, "media": "audio", "mean": "sample"},
        {"tensor": 4, "sequence": True, "pipeline": 2, "media": "imu", "trains": "frozen", "noise": "text"},
        {"pipeline": 4, "virtual": 2, "data": 2, "overlap": True, "tied_head": True, "media": "text"},
        {"pipeline": 4, "context": 2, "trains": "frozen", "recompute": "full", "mean": "sample"},
        {"tensor": 4, "context": 2, "tied_head": True, "media": "image", "trains": "full"},
        {"context": 4, "data": 2, "overlap": True, "media": "few media", "noise": "text"},
    )
)
DPO = tuple(
    replace(_LORA, job="dpo", **settings)
    for settings in (
        {"tensor": 2, "reference": "cached"},
        {"pipeline": 2, "uneven": True, "packs": 2},
        {"context": 2, "recompute": "selective", "reference": "cached", "distributed_optimizer": False},
        {"pipeline": 2, "start": "tp2-sp", "media": "image", "noise": "text", "reference": "cached"},
        {
            **{"tensor": 2, "sequence": True, "context": 2, "data": 2, "recompute": "full"},
            **{"start": "tp2-sp", "media": "image", "noise": "text"},
        },
        {"data": 2, "overlap": True, "media": "few media", "noise": "", "smoothing": 0.0, "reference": "cached"},
        {
            **{"pipeline": 2, "virtual": 2, "data": 2, "overlap": True, "recompute": "full"},
            **{"media": "few media", "noise": "", "smoothing": 0.0},
        },
        {"pipeline": 4, "virtual": 2, "tied_head": True, "media": "text", "reference": "cached"},
        {"context": 4, "media": "video"},
        {"tensor": 4, "sequence": True, "pipeline": 2, "start": "pp2-cp2", "media": "audio", "reference": "cached"},
        {"pipeline": 4, "context": 2, "recompute": "selective", "media": "imu", "noise": "text", "smoothing": 0.0},
        {"tensor": 4, "context": 2, "tied_head": True, "noise": "text"},
        {"context": 4, "data": 2, "overlap": True, "tied_head": True, "noise": "text", "reference": "cached"},
        {"tensor": 2, "sequence": True, "pipeline": 2, "virtual": 2, "data": 2, "start": "pp2-cp2", "media": "audio"},
    )
)


def _with_turn(layout: Layout, number: int) -> Layout:
    """Add the next options of the cycle that are compatible with the layout."""
    for offset in range(len(TURNS)):
        extras = TURNS[(number + offset) % len(TURNS)]
        varied = Layout(**{**asdict(layout), **extras})
        if varied.possible:
            return varied
    return layout


assert set(CHOICES) <= {field.name for field in fields(Layout)}
