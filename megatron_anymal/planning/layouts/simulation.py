"""Simulate a training step on a pipeline, event by event: when each pass and each message starts and ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_anymal.planning.layouts.schedule import Event, events_of_stage

# Groups of micro-batches, one per stage, of the shortest step that longer ones are extrapolated from.
_FEWER = 3


@dataclass(frozen=True)
class TimelineSpan:
    """Something that a stage does, for the timeline."""

    # forward, backward or exchange.
    kind: str
    # Model chunk of a pass.
    chunk: int
    # Micro-batch of a pass.
    micro_batch: int
    # Seconds from the beginning of the step.
    start: float
    # Seconds from the beginning of the step.
    end: float


@dataclass(frozen=True)
class PipelineTime:
    """The pipeline part of a step.

    Attributes:
        ends: seconds until each stage has finished its last pass.
        busy: seconds of passes of each stage.
        exchanging: seconds that messages take of each stage's time, without waiting for the neighbour.
        spans: of each stage in order; empty unless asked for.
    """

    ends: tuple[float, ...]
    busy: tuple[float, ...]
    exchanging: tuple[float, ...]
    spans: tuple[tuple[TimelineSpan, ...], ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds until the last stage has finished."""
        return max(self.ends)

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time in which a stage waits for others, as a mean over the stages."""
        idle = [self.seconds - busy - own for busy, own in zip(self.busy, self.exchanging)]
        return sum(idle) / len(idle) / self.seconds if self.seconds else 0.0


def simulate(
    passes: Sequence[Sequence[tuple[float, float]]],
    micro_batches: int,
    message: float,
    *,
    overlap: bool = True,
    timeline: bool = False,
) -> PipelineTime:
    """Simulate one step.

    All micro-batches cost the same, so that in the middle of a long step every group of micro-batches repeats the one
    before: such a step is extrapolated from shorter ones, once they grow evenly, unless the timeline is asked for.

    Args:
        passes: seconds of a forward and of a backward pass of each model chunk, per stage.
        micro_batches: per step.
        message: seconds of a message between neighbouring stages.
        overlap: `model.overlap_p2p_comm`; used with several chunks only.
        timeline: also return the spans.
    """
    stages = len(passes)
    rest, groups = micro_batches % stages, _FEWER
    while not timeline and (groups + 2) * stages + rest < micro_batches:
        short, longer, longest = (
            _Simulation(passes, (groups + more) * stages + rest, message, overlap, False).run() for more in range(3)
        )
        if _is_steady(short, longer, longest):
            return _extended(longer, longest, (micro_batches - rest) / stages - groups - 1)
        groups *= 2
    return _Simulation(passes, micro_batches, message, overlap, timeline).run()


def _is_steady(short: PipelineTime, longer: PipelineTime, longest: PipelineTime) -> bool:
    """Whether a further group of micro-batches takes every stage the same time, and the same as the one before it.

    Stages of different speed first use up the slack between them.
    """
    steps = [y - x for x, y in zip(longer.ends, longest.ends)]
    before = [y - x for x, y in zip(short.ends, longer.ends)]
    return max(steps + before) - min(steps + before) <= 1e-9 * longest.seconds


def _extended(longer: PipelineTime, longest: PipelineTime, groups: float) -> PipelineTime:
    """Extrapolate from two steps that differ by a group of micro-batches to `groups` more than the shorter has."""

    def extended(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(x + groups * (y - x) for x, y in zip(a, b))

    return PipelineTime(
        ends=extended(longer.ends, longest.ends),
        busy=extended(longer.busy, longest.busy),
        exchanging=extended(longer.exchanging, longest.exchanging),
    )


@dataclass
class _MessageStream:
    """The messages from one stage to a neighbour, in order: when each was offered, awaited and delivered."""

    sent: list[float] = field(default_factory=list)
    awaited: list[float] = field(default_factory=list)
    delivered: list[float] = field(default_factory=list)

    def settle(self, message: float) -> None:
        """Deliver what both sides are ready for; messages of a stream follow each other."""
        while len(self.delivered) < min(len(self.sent), len(self.awaited)):
            at = len(self.delivered)
            start = max(self.sent[at], self.awaited[at], self.delivered[-1] if at else 0.0)
            self.delivered.append(start + message)


# A message: its stream, and its number there.
_Message = tuple[_MessageStream, int]


@dataclass
class _Stage:
    """A stage's progress."""

    events: Sequence[Event]
    # Streams of activations to the next and from the previous stage, of gradients to the previous and from the next.
    out: _MessageStream
    into: _MessageStream
    back_out: _MessageStream
    back_into: _MessageStream
    at: int = 0
    clock: float = 0.0
    busy: float = 0.0
    exchanging: float = 0.0
    # Messages that the current exchange has begun.
    begun: list[_Message] | None = None
    # Messages received in the background that no pass has waited for yet, and the last ones sent.
    arriving: dict[str, list[_Message]] = field(default_factory=lambda: {"forward": [], "backward": []})
    leaving: dict[str, _Message] = field(default_factory=dict)
    spans: list[TimelineSpan] = field(default_factory=list)


class _Simulation:
    """The state of all stages; each goes on as far as it can, until all have finished."""

    def __init__(
        self,
        passes: Sequence[Sequence[tuple[float, float]]],
        micro_batches: int,
        message: float,
        overlap: bool,
        timeline: bool,
    ) -> None:
        stages, chunks = len(passes), len(passes[0])
        self.passes, self.message, self.timeline = passes, message, timeline
        forward, back = [_MessageStream() for _ in passes], [_MessageStream() for _ in passes]
        self.stages = [
            _Stage(
                events_of_stage(stage, stages, chunks, micro_batches, overlap),
                out=forward[stage],
                into=forward[stage - 1],
                back_out=back[stage],
                back_into=back[(stage + 1) % stages],
            )
            for stage in range(stages)
        ]

    def run(self) -> PipelineTime:
        """Run until every stage has finished."""
        waiting = list(range(len(self.stages)))
        while waiting:
            before = sum(stage.at for stage in self.stages)
            waiting = [number for number in waiting if not self._advance(number)]
            if waiting and sum(stage.at for stage in self.stages) == before:
                raise RuntimeError(f"The schedule does not end: stages {waiting} wait for each other.")
        return PipelineTime(
            ends=tuple(stage.clock for stage in self.stages),
            busy=tuple(stage.busy for stage in self.stages),
            exchanging=tuple(stage.exchanging for stage in self.stages),
            spans=tuple(tuple(stage.spans) for stage in self.stages) if self.timeline else (),
        )

    def _advance(self, number: int) -> bool:
        """Run a stage's events until one has to wait for another stage; return whether it has finished."""
        stage = self.stages[number]
        while stage.at < len(stage.events):
            event = stage.events[stage.at]
            done = self._exchange(stage, event) if event.kind == "exchange" else self._pass(number, stage, event)
            if not done:
                return False
            stage.at += 1
        return True

    def _pass(self, number: int, stage: _Stage, event: Event) -> bool:
        forward = event.kind == "forward"
        # Every pass but those whose input comes from nowhere waits for the oldest message in the background.
        chunks = len(self.passes[number])
        edge = (number, event.chunk) == ((0, 0) if forward else (len(self.passes) - 1, chunks - 1))
        arriving = stage.arriving[event.kind]
        if arriving and not edge:
            if not self._delivered(arriving[0]):
                return False
            stream, at = arriving.pop(0)
            stage.clock = max(stage.clock, stream.delivered[at])
        start, seconds = stage.clock, self.passes[number][event.chunk][0 if forward else 1]
        stage.clock += seconds
        stage.busy += seconds
        self._note(stage, event, start)
        return True

    def _exchange(self, stage: _Stage, event: Event) -> bool:
        if stage.begun is None:
            self._begin(stage, event)
        assert stage.begun is not None
        if event.waits:
            if not all(self._delivered(message) for message in stage.begun):
                return False
            start = stage.clock
            stage.clock = max(stream.delivered[at] for stream, at in stage.begun)
            stage.exchanging += min(self.message, stage.clock - start)
            self._note(stage, event, start)
        elif not self._previous_sent(stage, event):
            return False
        stage.begun = None
        return True

    def _begin(self, stage: _Stage, event: Event) -> None:
        stage.begun = []
        for wanted, stream, times in (
            (event.send_next, stage.out, stage.out.sent),
            (event.receive_previous, stage.into, stage.into.awaited),
            (event.send_previous, stage.back_out, stage.back_out.sent),
            (event.receive_next, stage.back_into, stage.back_into.awaited),
        ):
            if wanted:
                times.append(stage.clock)
                stage.begun.append((stream, len(times) - 1))
        if event.waits:
            return
        if event.receive_previous:
            stage.arriving["forward"].append((stage.into, len(stage.into.awaited) - 1))
        if event.receive_next:
            stage.arriving["backward"].append((stage.back_into, len(stage.back_into.awaited) - 1))

    def _previous_sent(self, stage: _Stage, event: Event) -> bool:
        """Wait for the message that was sent in the background before; remember the one that is sent now."""
        kind = "forward" if event.send_next or event.receive_previous else "backward"
        if kind in stage.leaving:
            if not self._delivered(stage.leaving[kind]):
                return False
            stream, at = stage.leaving.pop(kind)
            stage.clock = max(stage.clock, stream.delivered[at])
        sends = stage.out if kind == "forward" else stage.back_out
        if event.send_next or event.send_previous:
            stage.leaving[kind] = (sends, len(sends.sent) - 1)
        return True

    def _delivered(self, message: _Message) -> bool:
        stream, at = message
        stream.settle(self.message)
        return at < len(stream.delivered)

    def _note(self, stage: _Stage, event: Event, start: float) -> None:
        if self.timeline and stage.clock > start:
            stage.spans.append(TimelineSpan(event.kind, event.chunk, event.micro_batch, start, stage.clock))
