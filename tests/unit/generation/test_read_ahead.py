"""Prompts that are read in advance: the same results and errors, made while the model computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import DataError, TextPart
from megatron_anymal.evaluation.answering import Asking, answer_samples
from megatron_anymal.evaluation.journal import Journal
from megatron_anymal.evaluation.media_cells import MediaItem
from megatron_anymal.evaluation.samples import TaskSample
from megatron_anymal.generation.answers import Reply
from megatron_anymal.generation.generator import Generator, Watch
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.read_ahead import ReadAhead, reading_threads
from megatron_anymal.generation.sampling import Sampling


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt([TextPart(text)], []) for text in texts]


def text_of(prompts: Sequence[Prompt]) -> str:
    part = prompts[0].parts[0]
    assert isinstance(part, TextPart)
    return part.text


class Recorded:
    """Reads prompts, once allowed to, and records what it read and on which thread."""

    def __init__(self, *, allowed: bool = True) -> None:
        self.allowed = threading.Event()
        self.read: list[tuple[str, bool]] = []
        if allowed:
            self.allowed.set()

    def __call__(self, prompts: Sequence[Prompt]) -> str:
        assert self.allowed.wait(20)
        text = text_of(prompts)
        self.read.append((text, threading.current_thread() is threading.main_thread()))
        if text.startswith("bad"):
            raise DataError(f"{text} cannot be read")
        return text.upper()


def test_announced_prompts_are_read_on_other_threads() -> None:
    read = Recorded(allowed=False)
    ahead, prompts = ReadAhead(read), prompts_of("a", "b", "c")
    ahead.announce([[prompt] for prompt in prompts])
    assert not read.read
    read.allowed.set()
    assert [ahead.take([prompt]) for prompt in reversed(prompts)] == ["C", "B", "A"]
    assert sorted(read.read) == [("a", False), ("b", False), ("c", False)]
    # Taken once: it is not kept.
    assert ahead.take([prompts[0]]) == "A" and read.read[-1] == ("a", True)


def test_prompts_of_the_same_content_are_different_prompts() -> None:
    read = Recorded()
    ahead, (one, other) = ReadAhead(read), prompts_of("a", "a")
    ahead.announce([[one]])
    assert ahead.take([other]) == "A" and ("a", True) in read.read


def test_errors_come_with_their_prompt() -> None:
    ahead, prompts = ReadAhead(Recorded()), prompts_of("a", "bad", "c")
    ahead.announce([[prompt] for prompt in prompts])
    assert ahead.take(prompts[:1]) == "A" and ahead.take(prompts[2:]) == "C"
    with pytest.raises(DataError, match="bad cannot be read"):
        ahead.take(prompts[1:2])


def test_what_is_not_announced_again_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert reading_threads() == 1
    read = Recorded(allowed=False)
    ahead, prompts = ReadAhead(read), prompts_of("a", "b", "c")
    ahead.announce([[prompt] for prompt in prompts])
    # The only thread has begun with the first one.
    ahead.announce([prompts[2:], prompts[2:]])
    read.allowed.set()
    assert ahead.take(prompts[2:]) == "C"
    assert "b" not in [text for text, _ in read.read] and len(read.read) <= 2


class Echo(Generator):
    """Answers with what it read; notes what has been read when it begins to answer."""

    kinds = ("image",)
    replica, replicas = 0, 1

    def __init__(self) -> None:
        self.read = Recorded()
        self.ahead = ReadAhead(self.read)
        self.begun: list[int] = []

    def read_ahead(self, batches: Sequence[Sequence[Prompt]]) -> None:
        self.ahead.announce([[prompt] for batch in batches for prompt in batch])
        self.begun.append(sum(map(len, batches)))

    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        return [Reply.of_parts([self.ahead.take([prompt])]) for prompt in prompts]

    def _log_likelihoods(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        raise NotImplementedError


def test_the_next_batch_is_announced() -> None:
    generator, prompts = Echo(), prompts_of(*map(str, range(7)))
    assert generator.answer(prompts, Sampling(), 3) == [str(n) for n in range(7)]
    assert generator.begun == [6, 4, 1] and len(generator.read.read) == 7
    assert not any(on_main for _, on_main in generator.read.read)
    # One batch has nothing to overlap with.
    assert generator.answer(prompts, Sampling(), 7) == [str(n) for n in range(7)] and len(generator.begun) == 3


def sample(number: int, read: Callable[[], MediaFile]) -> TaskSample:
    return TaskSample(number, str(number), "vqa", {"question": "x" * (9 - number)}, (MediaItem("it", read),), ())


def test_media_that_cannot_be_read_lose_no_answers(tmp_path: Path) -> None:
    def missing() -> MediaFile:
        raise DataError("it is not there")

    there = MediaFile(b"", "png")
    samples = [sample(n, missing if n == 5 else lambda: there) for n in range(6)]
    generator, journal = Echo(), Journal(tmp_path)
    with pytest.raises(DataError, match="vqa: samples '4' to '5': it is not there"):
        answer_samples(lambda: generator, samples, Asking("vqa", Sampling(), 2, likelihood=False), journal)
    assert sorted(journal.read()) == ["0", "1", "2", "3"]
    # The prompts of a batch that failed were not announced; it is tried again in its turn.
    assert generator.begun == [4, 2]
