"""Prompts that are read in advance by other processes: the same results and errors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fork_server
import pytest
import torch
from ranks import run_ranks

from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import DataError, TextPart
from megatron_anymal.evaluation.answering import Asking, answer_samples
from megatron_anymal.evaluation.journal import AnswerJournal
from megatron_anymal.evaluation.media_cells import MediaItem
from megatron_anymal.evaluation.samples import TaskSample
from megatron_anymal.generation.answers import Reply
from megatron_anymal.generation.generator import Generator, Watch
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.read_ahead import ReadAhead, reading_processes
from megatron_anymal.generation.sampling import Sampling


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt([TextPart(text)], []) for text in texts]


def text_of(prompts: Sequence[Prompt]) -> str:
    part = prompts[0].parts[0]
    assert isinstance(part, TextPart)
    return part.text


class Echo(Generator):
    """Answers with the read text and the process that read it; notes how many prompts are announced each time."""

    kinds = ("image",)
    replica, replicas = 0, 1

    def __init__(self, processes: int = 0) -> None:
        self.ahead = ReadAhead(read)
        self.ahead.processes = processes
        self.announced: list[int] = []

    def read_ahead(self, batches: Sequence[Sequence[Prompt]]) -> None:
        self.ahead.announce([[prompt] for batch in batches for prompt in batch])
        self.announced.append(sum(map(len, batches)))

    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        return [Reply.of_parts([" ".join(map(str, self.ahead.take([prompt])[:2]))]) for prompt in prompts]

    def _log_likelihoods(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        raise NotImplementedError


def read(prompts: Sequence[Prompt]) -> tuple[str, int, torch.Tensor, torch.Tensor]:
    """The text, the process, and tensors of two types."""
    text = text_of(prompts)
    if text.startswith("bad"):
        raise DataError(f"{text} cannot be read")
    if text == "end":
        os.kill(os.getpid(), signal.SIGKILL)
    return text.upper(), os.getpid(), torch.arange(6.0).view(2, 3), torch.ones(2, dtype=torch.bfloat16)


def ahead_of(*texts: str, processes: int = 2) -> tuple[ReadAhead, list[Prompt]]:
    ahead, prompts = ReadAhead(read), prompts_of(*texts)
    ahead.processes = processes
    ahead.announce([[prompt] for prompt in prompts])
    return ahead, prompts


def _others_read() -> None:
    ahead, prompts = ahead_of("a", "b", "c")
    results = [ahead.take([prompt]) for prompt in reversed(prompts)]
    assert [text for text, *_ in results] == ["C", "B", "A"]
    assert os.getpid() not in {process for _, process, *_ in results}
    for _, _, values, half in results:
        assert torch.equal(values, torch.arange(6.0).view(2, 3)) and torch.equal(half, torch.ones(2).bfloat16())
        values += 1
    # Taken once: it is not kept.
    assert ahead.take([prompts[0]])[:2] == ("A", os.getpid())


def test_announced_prompts_are_read_by_other_processes() -> None:
    run_ranks(1, _others_read)


def _same_content() -> None:
    ahead, [one] = ahead_of("a")
    [other] = prompts_of("a")
    assert ahead.take([other])[1] == os.getpid() != ahead.take([one])[1]


def test_prompts_of_the_same_content_are_different_prompts() -> None:
    run_ranks(1, _same_content)


def _errors() -> None:
    # Eight prompts are handed over in groups of four.
    ahead, prompts = ahead_of("a", "bad", "c", *"defgh", processes=1)
    assert ahead.take(prompts[:1])[0] == "A" and ahead.take(prompts[2:3])[0] == "C"
    with pytest.raises(DataError, match="bad cannot be read") as raised:
        ahead.take(prompts[1:2])
    # Where it was raised.
    [note] = raised.value.__notes__
    assert f", in {read.__name__}" in note


def test_errors_come_with_their_prompt() -> None:
    run_ranks(1, _errors)


def _death() -> None:
    ahead, prompts = ahead_of("end", "b")
    message = "A process that reads media exited unexpectedly.*--workers"
    with pytest.raises(DataError, match=message):
        ahead.take(prompts[:1])
    with pytest.raises(DataError, match=message):
        ahead.announce([prompts_of("c")])


def test_the_end_of_a_reading_process_is_said() -> None:
    run_ranks(1, _death)


def _dropped() -> None:
    ahead, prompts = ahead_of("a", "b", "c", *("d" * 50), processes=1)
    ahead.announce([prompts[2:3], prompts[2:3]])
    assert ahead.take(prompts[2:3])[1] != os.getpid() == ahead.take(prompts[-1:])[1]


def test_what_is_not_announced_again_is_dropped() -> None:
    run_ranks(1, _dropped)


def test_without_processes_nothing_is_read_in_advance() -> None:
    ahead, prompts = ahead_of("a", processes=0)
    assert ahead.take(prompts)[:2] == ("A", os.getpid())


def test_processes_are_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    for ranks, expected in ((1, 8), (8, 7), (16, 3), (64, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert reading_processes() == expected


def _batches() -> None:
    generator, prompts = Echo(1), prompts_of(*map(str, range(7)))
    answers = [answer.split() for answer in generator.answer(prompts, Sampling(), 3)]
    assert [text for text, _ in answers] == [str(n) for n in range(7)] and generator.announced == [6, 4, 1]
    assert str(os.getpid()) not in {process for _, process in answers}
    # One batch has nothing to overlap with.
    generator.answer(prompts, Sampling(), 7)
    assert len(generator.announced) == 3


def test_the_next_batch_is_announced() -> None:
    run_ranks(1, _batches)


def _ends() -> None:
    ahead, prompts = ahead_of(*"abcdef")
    ahead.take(prompts[:1])


def test_a_process_that_multiprocessing_started_ends() -> None:
    process = fork_server.start(_ends)
    process.join(240)
    process.kill()
    assert process.exitcode == 0


def _freed() -> None:
    ahead, prompts = ahead_of("a", "b", processes=1)
    process = Path("/proc") / str(ahead.take(prompts[:1])[1])
    assert process.exists()
    del ahead
    wait_for_end(process)


def test_reading_processes_end_with_their_reader() -> None:
    run_ranks(1, _freed)


def wait_for_end(process: Path) -> None:
    end = time.monotonic() + 240
    while process.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not process.exists()


def _orphaned(path: str) -> None:
    ahead, prompts = ahead_of("a", "b", processes=1)
    Path(path).write_text(str(ahead.take(prompts[:1])[1]))
    os.kill(os.getpid(), signal.SIGKILL)


def test_reading_processes_end_with_theirs(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="ended without an answer"):
        run_ranks(1, _orphaned, str(tmp_path / "pid"))
    wait_for_end(Path("/proc") / (tmp_path / "pid").read_text())


def sample(number: int, read: Callable[[], MediaFile]) -> TaskSample:
    return TaskSample(number, str(number), "vqa", {"question": "x" * (9 - number)}, (MediaItem("it", read),), ())


def test_media_that_cannot_be_read_lose_no_answers(tmp_path: Path) -> None:
    def missing() -> MediaFile:
        raise DataError("it is not there")

    media_file = MediaFile(b"", "png")
    samples = [sample(n, missing if n == 5 else lambda: media_file) for n in range(6)]
    generator, journal = Echo(), AnswerJournal(tmp_path)
    with pytest.raises(DataError, match="vqa: samples '4' to '5': it is not there"):
        answer_samples(lambda: generator, samples, Asking("vqa", Sampling(), 2, likelihood=False), journal)
    assert sorted(journal.read()) == ["0", "1", "2", "3"]
    # The prompts of a batch that failed were not announced; it is tried again in its turn.
    assert generator.announced == [4, 2]
