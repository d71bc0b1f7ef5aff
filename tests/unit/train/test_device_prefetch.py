"""Micro-batches are copied one ahead: order, count, errors and early ends, without a GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import closing, nullcontext
from typing import Any

import pytest
import torch

from megatron_anymal.data.micro_batch import MediaBatch, MicroBatch
from megatron_anymal.train.device_prefetch import SideStream, on_device, one_ahead

CPU = torch.device("cpu")


def micro_batch(number: int) -> MicroBatch:
    media = {"image": MediaBatch(torch.full((1, 2), float(number)), ((1,),), torch.tensor([0]))}
    return MicroBatch.unlabelled([[number, number]], media)


class WrittenDown:
    """Stands in for the copy to the device: records its calls and fails on one micro-batch."""

    def __init__(self, refused: int = -1) -> None:
        self.events: list[tuple[str, int]] = []
        self.handed_out: list[weakref.ref[MicroBatch]] = []
        self._refused = refused

    def start(self, one: MicroBatch) -> MicroBatch:
        number = int(one.tokens[0, 0])
        self.events.append(("start", number))
        if number == self._refused:
            raise RuntimeError("no memory left")
        copy = one.with_tensors(torch.clone)
        self.handed_out.append(weakref.ref(copy))
        return copy

    def finish(self, started: MicroBatch) -> MicroBatch:
        self.events.append(("finish", int(started.tokens[0, 0])))
        return started

    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.handed_out)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_each_once_in_order_with_the_next_one_under_way(count: int) -> None:
    lane, seen = WrittenDown(), []
    for one in one_ahead((micro_batch(n) for n in range(count)), lane):
        number = int(one.tokens[0, 0])
        seen.append(number)
        assert float(one.media["image"].pieces[0, 0]) == number
        started = [n for event, n in lane.events if event == "start"]
        finished = [n for event, n in lane.events if event == "finish"]
        assert started == list(range(min(number + 2, count)))
        assert finished == list(range(number + 1))
        # Its copy finished before the next one started: the GPU must not wait for both.
        if number + 1 < count:
            assert lane.events.index(("finish", number)) < lane.events.index(("start", number + 1))
    assert seen == list(range(count))


def test_no_more_than_two_take_memory() -> None:
    lane = WrittenDown()
    batches = one_ahead((micro_batch(n) for n in range(5)), lane)

    def compute() -> int:
        one = next(batches)
        return int(one.tokens.sum())

    for _ in range(4):
        compute()
        # The computed micro-batch is freed, the next one is in flight.
        assert lane.alive() == 1
    compute()
    assert lane.alive() == 0


def test_errors_come_through() -> None:
    def broken() -> Iterator[MicroBatch]:
        yield micro_batch(0)
        raise ValueError("a shard is gone")

    with pytest.raises(ValueError, match="a shard is gone"):
        list(one_ahead(broken(), WrittenDown()))
    lane = WrittenDown(refused=2)
    batches = one_ahead((micro_batch(n) for n in range(4)), lane)
    next(batches)
    with pytest.raises(RuntimeError, match="no memory left"):
        next(batches)
    assert lane.alive() == 0


def test_an_early_end_waits_for_what_is_under_way_and_lets_it_go() -> None:
    lane = WrittenDown()
    batches = one_ahead((micro_batch(n) for n in range(4)), lane)

    def step_that_fails() -> None:
        with closing(batches):
            next(batches)
            raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError, match="the step failed"):
        step_that_fails()
    assert lane.events == [("start", 0), ("finish", 0), ("start", 1), ("finish", 1)]
    assert lane.alive() == 0


def test_nothing_is_copied_on_a_cpu() -> None:
    given = [micro_batch(n) for n in range(3)]
    for theirs, mine in zip(given, on_device(given, CPU), strict=True):
        assert mine is theirs
    without: Any = list(on_device(given, CPU, media=False))
    assert [m.tokens.data_ptr() for m in without] == [m.tokens.data_ptr() for m in given]
    assert not any(m.media for m in without)


def test_every_tensor_of_a_micro_batch_is_reached() -> None:
    one = micro_batch(1)
    one.branch, one.label_index = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([1])
    one.media["image"].soft_index = torch.tensor([0])
    tensors: list[torch.Tensor] = []
    one.with_tensors(lambda tensor: tensors.append(tensor) or tensor)
    image = one.media["image"]
    expected = [one.tokens, one.labels, one.loss_mask, one.sample_positions, one.branch, one.label_index]
    expected += [image.pieces, image.token_index, image.soft_index]
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in expected}


def test_the_side_stream_waits_for_the_computation_and_the_computation_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "side" if name == CPU else name

        def wait_stream(self, other: Any) -> None:
            events.append((self.name, other.name))

    current, within = Stream("current"), []
    copy_into = torch.Tensor.copy_

    def copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        within.append(non_blocking)
        events.append(("copy", ""))
        return copy_into(target, source)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    lane, one = SideStream(CPU), micro_batch(3)
    started = lane.start(one)
    assert events[0] == ("side", "current") and set(events[1:]) == {("copy", "")} and all(within)
    assert lane.finish(started) is started and events[-1] == ("current", "side")
    assert torch.equal(started.media["image"].pieces, one.media["image"].pieces)
    assert torch.equal(started.tokens, one.tokens) and started.tokens is not one.tokens
