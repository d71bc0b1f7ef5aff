"""Overload, slow clients, clients that leave, failures and the end: places are freed, memory is bounded."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from chat_service import Scripted, Served, ask, chunks, serving, text_of

from megatron_anymal.config import ConfigError
from megatron_anymal.serving.limits import ServingLimits


def connect(served: Served, body: dict[str, Any], receive_buffer: int = 0) -> socket.socket:
    """Send a request and read nothing of its reply."""
    host, port = served.url.removeprefix("http://").split(":")
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json"
    client.sendall(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return client


def test_more_requests_than_fit_are_refused_and_the_others_answered() -> None:
    script = Scripted()
    with serving(script, ServingLimits(max_batch=2, max_queue=3)) as served, ThreadPoolExecutor(5) as pool:
        script.gate.clear()
        replies = [pool.submit(served.post, ask()) for _ in range(5)]
        served.wait(lambda service: service.in_flight == 5)
        refused = served.post(ask())
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        script.gate.set()
        assert [reply.result().status_code for reply in replies] == [200] * 5
        assert script.largest == 2
        # The places are free again.
        assert served.post(ask()).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(stream: bool) -> None:
    script = Scripted(times=10**6, pause=0.002)
    limits = ServingLimits(max_batch=1, max_queue=1, max_new_tokens=10**6, max_cache_tokens=10**7)
    with serving(script, limits) as served:
        leaving, waiting = (connect(served, ask(stream=stream)) for _ in range(2))
        served.wait(lambda service: service.engine.running == 1 and service.engine.waiting == 1)
        leaving.close()
        waiting.close()
        served.wait(lambda service: service.in_flight == 0 and not service.engine.running + service.engine.waiting)
        assert served.post(ask(max_tokens=3)).status_code == 200


def test_a_client_that_leaves_the_queue_is_forgotten_at_once() -> None:
    script = Scripted(times=10**6, pause=0.002)
    limits = ServingLimits(max_batch=1, max_queue=1, max_new_tokens=10**6, max_cache_tokens=10**7)
    with serving(script, limits) as served:
        staying = connect(served, ask())
        served.wait(lambda service: service.engine.running == 1)
        leaving = connect(served, ask())
        served.wait(lambda service: service.engine.waiting == 1)
        leaving.close()
        served.wait(lambda service: service.engine.waiting == 0 and service.in_flight == 1)
        assert served.service.engine.running == 1
        staying.close()


@pytest.mark.parametrize("kernel", [True, False])
def test_a_slow_client_loses_its_place_and_delays_nobody(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        # Not every system can drop such connections by itself.
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    script = Scripted(words=["word " * 1500], times=10**6, pause=0.001)
    limits = ServingLimits(max_batch=2, max_queue=0, max_new_tokens=10**6, max_cache_tokens=10**7, client_timeout=0.5)
    with serving(script, limits) as served:
        slow = connect(served, ask(stream=True), receive_buffer=4096)
        served.wait(lambda service: service.engine.running == 1)
        begun = time.monotonic()
        assert served.post(ask(max_tokens=5)).status_code == 200
        assert time.monotonic() - begun < 40
        served.wait(lambda service: service.in_flight == 0 and service.engine.running == 0)
        # The connection is given up: what is left in buffers, which are small, ends without the end of the reply.
        slow.settimeout(240)
        received = b""
        try:
            while data := slow.recv(2**16):
                received += data
        except ConnectionError:
            pass
        slow.close()
        assert b"[DONE]" not in received and len(received) < 2**20


def open_request(served: Served, length: int) -> socket.socket:
    """Send the head of a request with a body of so many bytes."""
    host, port = served.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json"
    client.sendall(f"{head}\r\nContent-Length: {length}\r\n\r\n".encode())
    return client


@pytest.mark.parametrize("sent", [b"", b"{"])
def test_a_body_that_does_not_arrive_is_refused(sent: bytes) -> None:
    with serving(Scripted(), ServingLimits(client_timeout=0.3)) as served:
        with open_request(served, 100) as client:
            client.sendall(sent)
            client.settimeout(240)
            assert b" 408 " in client.recv(200)
        served.wait(lambda service: service.in_flight == 0)


def test_a_body_above_the_limit_is_refused_before_it_is_sent() -> None:
    with serving(Scripted()) as served:
        with open_request(served, 10**9) as client:
            client.settimeout(240)
            assert b" 413 " in client.recv(200)
        served.wait(lambda service: service.in_flight == 0)


def test_a_body_that_keeps_arriving_may_take_longer_than_the_timeout() -> None:
    data = json.dumps(ask(user="a" * 600_000)).encode()
    with serving(Scripted(), ServingLimits(client_timeout=2.0)) as served, open_request(served, len(data)) as client:
        for start in range(0, len(data), 100_000):
            client.sendall(data[start : start + 100_000])
            # Faster than 64 KiB per second.
            time.sleep(0.5)
        client.settimeout(240)
        assert b" 200 " in client.recv(200)


def test_requests_above_the_cache_are_refused_and_the_others_wait_their_turn() -> None:
    script = Scripted(times=10)
    limits = ServingLimits(max_batch=8, max_cache_tokens=60, max_new_tokens=100)
    with serving(script, limits) as served, ThreadPoolExecutor(6) as pool:
        refused = served.post(ask(max_tokens=90))
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
        assert "--max-cache-tokens is 60" in refused.json()["error"]["message"]
        script.gate.clear()
        asked = [pool.submit(served.post, ask(max_tokens=12)) for _ in range(6)]
        served.wait(lambda service: service.in_flight == 6)
        script.gate.set()
        replies = [one.result() for one in asked]
        assert [reply.status_code for reply in replies] == [200] * 6
        longest = replies[0].json()["usage"]["total_tokens"]
        assert script.largest == 60 // longest < 6


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_ends_its_requests_and_the_server_recovers(stream: bool) -> None:
    script = Scripted()
    with serving(script) as served:
        script.failing = True
        reply = served.post(ask(stream=stream))
        payload = chunks(reply.iter_lines())[-1] if stream else reply.text
        assert json.loads(payload)["error"]["type"] == "server_error"
        assert stream or reply.status_code == 500
        assert httpx.get(f"{served.url}/health").status_code == 503
        script.failing = False
        assert served.post(ask()).status_code == 200 and httpx.get(f"{served.url}/health").status_code == 200


def test_the_end_lets_running_requests_finish_and_refuses_new_ones() -> None:
    script = Scripted()
    with serving(script) as served, ThreadPoolExecutor(2) as pool:
        script.gate.clear()
        stream, whole = (pool.submit(served.post, ask(stream=stream)) for stream in (True, False))
        served.wait(lambda service: service.in_flight == 2)
        served.server.handle_exit(signal.SIGTERM, None)
        refused = served.post(ask())
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{served.url}/health").status_code == 503
        script.gate.set()
        assert text_of(chunks(stream.result().iter_lines())) == "one two three"
        assert whole.result().json()["choices"][0]["message"]["content"] == "one two three"
        _wait_for_end(served)


@pytest.mark.parametrize("signals", [1, 2])
def test_after_the_deadline_requests_end_with_an_error(signals: int) -> None:
    script = Scripted(times=10**6, pause=0.002)
    limits = ServingLimits(max_new_tokens=10**6, max_cache_tokens=10**7)
    with serving(script, limits, shutdown_seconds=0.3 if signals == 1 else 60) as served, ThreadPoolExecutor(2) as pool:
        stream, whole = (pool.submit(served.post, ask(stream=stream)) for stream in (True, False))
        served.wait(lambda service: service.engine.running == 2)
        for _ in range(signals):
            served.server.handle_exit(signal.SIGTERM, None)
        assert whole.result().status_code == 503
        assert chunks(stream.result().iter_lines())[-1].startswith('{"error": {"message": "the server shut down."')
        _wait_for_end(served)


def test_sixty_four_clients_share_one_batch() -> None:
    script, barrier = Scripted(times=4, pause=0.01), threading.Barrier(64)

    def client(number: int) -> str:
        barrier.wait(240)
        reply = served.post(ask(f"client {number}", stream=number % 2 == 0))
        assert reply.status_code == 200
        return (
            text_of(chunks(reply.iter_lines())) if number % 2 == 0 else reply.json()["choices"][0]["message"]["content"]
        )

    with serving(script) as served, ThreadPoolExecutor(64) as pool:
        texts = set(pool.map(client, range(64)))
        assert texts == {" ".join(["one two three"] * 4)}
        assert script.largest > 16
        # A client may have its answer before the request has left the count.
        served.wait(lambda service: service.in_flight == 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_body_bytes", 0),
        ("max_queue", -1),
        ("max_batch", 0),
        ("max_new_tokens", 0),
        ("max_cache_tokens", 1),
        ("client_timeout", 0.0),
    ],
)
def test_limits_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    option = name.replace("_bytes", "_mb").replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{option}=.* must be "):
        ServingLimits(**{name: value})  # type: ignore[arg-type]


def _wait_for_end(served: Served) -> None:
    deadline = time.monotonic() + 240
    while True:
        try:
            httpx.get(f"{served.url}/health", timeout=5)
        except httpx.TransportError:
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)
