"""Servers in this process, and a model that answers as a test wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from megatron_anymal.data.records import MediaPart
from megatron_anymal.generation.answers import Answer, Reply
from megatron_anymal.generation.generator import Generator, Watch
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.running_batch import RunningBatch, RunningPrompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.integrity.checks import Checks
from megatron_anymal.serving.limits import ServingLimits
from megatron_anymal.serving.server import GracefulServer, listen
from megatron_anymal.serving.service import Service


class Scripted(Generator):
    """Repeats one text, a token per step, until it is complete.

    Attributes:
        gate: while it is cleared, no step is computed.
        failing: joins and steps raise.
        largest: maximum number of prompts that were in the batch together.
    """

    kinds = ("image", "imu")

    def __init__(self, words: Sequence[str] = ("one ", "two ", "three "), times: int = 1, pause: float = 0.0):
        self.words, self.count, self.pause = list(words), len(words) * times, pause
        self.gate, self.failing, self.largest = threading.Event(), False, 0
        self.gate.set()
        self.batch = _ScriptedBatch(self)

    def running_batch(self) -> RunningBatch:
        return self.batch

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.words[token % len(self.words)] for token in tokens)

    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        raise NotImplementedError

    def _log_likelihoods(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        raise NotImplementedError


class _ScriptedBatch(RunningBatch):
    def __init__(self, script: Scripted):
        super().__init__()
        self._script = script

    def read(self, prompt: Prompt, sampling: Sampling) -> RunningPrompt:
        length = sum(1 if isinstance(part, MediaPart) else len(part.text.split()) for part in prompt.parts)
        answer = Answer(0, self._script.decode, {self._script.count}, sampling.stop, sampling.max_new_tokens)
        return RunningPrompt([0] * length, [], answer, sampling)

    def _first_tokens(self, prompts: Sequence[RunningPrompt]) -> list[int]:
        self._script.largest = max(self._script.largest, len(self.running) + len(prompts))
        return self._tokens(prompts)

    def _next_tokens(self) -> list[int]:
        return self._tokens(self.running)

    def _tokens(self, prompts: Sequence[RunningPrompt]) -> list[int]:
        self._script.gate.wait(60)
        time.sleep(self._script.pause)
        if self._script.failing:
            raise RuntimeError("the device is gone")
        return [len(one.answer.tokens) for one in prompts]

    def _keep(self, rows: Sequence[int]) -> None:
        pass


class Served:
    """A running server.

    Attributes:
        url: its address.
    """

    def __init__(self, service: Service, server: GracefulServer, url: str):
        self.service, self.server, self.url = service, server, url

    def post(self, body: Any, **arguments: Any) -> httpx.Response:
        """Send a request for a completion."""
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=240, **arguments)

    def wait(self, condition: Any, seconds: float = 30) -> None:
        """Wait until a condition of the service holds."""
        deadline = time.monotonic() + seconds
        while not condition(self.service):
            assert time.monotonic() < deadline, (self.service.in_flight, self.service.engine.running)
            time.sleep(0.01)


@contextmanager
def serving(
    generator: Generator,
    limits: ServingLimits = ServingLimits(),  # noqa: B008  (frozen)
    checks: Checks | None = None,
    shutdown_seconds: float = 10.0,
) -> Iterator[Served]:
    """A server of the model `tiny` in a thread of this process, which ends with the block."""
    opened, ready = listen("127.0.0.1", 0, limits.client_timeout), threading.Event()
    service = Service(generator, "tiny", limits, checks)
    server = GracefulServer(service, shutdown_seconds, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        assert ready.wait(240)
        yield Served(service, server, f"http://127.0.0.1:{opened.getsockname()[1]}")
    finally:
        server.handle_exit(15, None)
        thread.join(240)
        service.close()
    assert not thread.is_alive()


def ask(content: Any = "what is this", **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


def chunks(lines: Iterator[str]) -> list[Any]:
    """Events of a stream, the last one as text."""
    events = [line.removeprefix("data: ") for line in lines if line]
    return [json.loads(line) for line in events[:-1]] + events[-1:]


def text_of(events: Sequence[Any]) -> str:
    """Text of a stream."""
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1] if e.get("choices"))
