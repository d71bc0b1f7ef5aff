"""The layouts that the parity suite runs: a selection that has every possible pair of settings at least once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_anymal.config import AnyMALConfig

MOST_PROCESSES = 8
# Of parity.data.
LAYERS = 8


@dataclass(frozen=True)
class Layout:
    """One way to run: how it is spread over processes, what it reads and what it trains."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    recompute: str = ""
    # Of parity.data.MEDIA.
    media: str = "mixed"
    # Projectors and the IMU encoder always; of the Llama "frozen": nothing; "lora": adapters; "partial": some of its
    # weights; "full": all of it.
    trains: str = "frozen"
    # Fewer layers on the first stage.
    uneven: bool = False
    # Gradients are reduced, and weights gathered, during the passes.
    overlap: bool = False
    distributed_optimizer: bool = True
    tied_head: bool = False
    # Packs that one forward pass takes.
    packs: int = 1

    @property
    def processes(self) -> int:
        """How many processes it takes."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def name(self) -> str:
        """Short, for tables and test names."""
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
                ("plain-optimizer", not self.distributed_optimizer),
                ("tied", self.tied_head),
                ("two-packs", self.packs > 1),
            )
            if on
        ]
        return "-".join([*(parallel or ["one"]), *marks, self.media.replace(" ", "-"), self.trains])

    @property
    def possible(self) -> bool:
        """Whether the settings go together, on as many processes as are at hand."""
        return (
            self.processes <= MOST_PROCESSES
            and (self.tensor > 1 or not self.sequence)
            and (self.pipeline > 1 or (self.virtual == 1 and not self.uneven))
            # Two stages of 2 and 6 layers, in one part each or in two; more stages have no uneven split of 8 in parts.
            and (not self.uneven or self.pipeline == 2)
            and (self.distributed_optimizer or not self.overlap)
        )

    def applied(self, base: AnyMALConfig) -> AnyMALConfig:
        """The configuration of a run under this layout."""
        config = copy.deepcopy(base)
        config.trainer.devices = self.processes
        model = config.model
        model.tensor_model_parallel_size, model.sequence_parallel = self.tensor, self.sequence
        model.pipeline_model_parallel_size = self.pipeline
        model.virtual_pipeline_model_parallel_size = self.virtual
        model.context_parallel_size = self.context
        model.recompute_granularity, model.micro_batch_size = self.recompute, self.packs
        if self.uneven:
            model.num_layers_in_first_pipeline_stage = LAYERS // 4
            model.num_layers_in_last_pipeline_stage = LAYERS - LAYERS // 4
        model.ddp.use_distributed_optimizer = self.distributed_optimizer
        model.ddp.overlap_grad_reduce = model.ddp.overlap_param_gather = self.overlap
        # Small buckets: several reductions are under way at once.
        model.ddp.bucket_size = 1000 if self.overlap else 0
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
# Not crossed with everything: each layout of the selection takes its turn.
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
    """Every pair of settings that a layout has."""
    return frozenset(itertools.combinations(((name, getattr(layout, name)) for name in CHOICES), 2))


def possible_layouts() -> Iterator[Layout]:
    """All layouts that fit on the processes."""
    for values in itertools.product(*CHOICES.values()):
        layout = Layout(**dict(zip(CHOICES, values)))
        if layout.possible:
            yield layout


def cover(count: int) -> list[Layout]:
    """Layouts that have every possible pair of settings, at least `count` of them; the same every time.

    Greedy: next comes the layout with the most pairs that none before had; of equals, and once all pairs were there,
    the one whose settings were used least, on the most processes.
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


def _with_turn(layout: Layout, number: int) -> Layout:
    """The layout with the extras whose turn it is, or the next that go with it."""
    for offset in range(len(TURNS)):
        extras = TURNS[(number + offset) % len(TURNS)]
        varied = Layout(**{**asdict(layout), **extras})
        if varied.possible:
            return varied
    return layout


assert set(CHOICES) <= {field.name for field in fields(Layout)}
