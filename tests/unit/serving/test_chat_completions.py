"""OpenAI's wire format: whole answers, streams and their ends, refusals by field."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from chat_service import Scripted, Served, ask, chunks, serving, text_of
from tiny import png

from megatron_anymal.serving.limits import ServingLimits

PICTURE = base64.b64encode(png(1)).decode()
LIMITS = ServingLimits(max_body_bytes=200_000, max_new_tokens=8)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(Scripted(), LIMITS) as running:
        yield running


def test_a_whole_answer(served: Served) -> None:
    completion = served.post(ask()).json()
    assert (
        completion["object"] == "chat.completion"
        and completion["model"] == "tiny"
        and completion["id"].startswith("chatcmpl-")
    )
    [choice] = completion["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two three", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    # The header's two words (user, assistant), the marks, and the three words of the question.
    counts = completion["usage"]
    assert counts["completion_tokens"] == 3
    assert counts["total_tokens"] == 3 + counts["prompt_tokens"] and counts["prompt_tokens"] > 3


def test_a_stream_has_the_same_text_and_ends_like_openais(served: Served) -> None:
    body = ask(stream=True, stream_options={"include_usage": True})
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=240) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = chunks(reply.iter_lines())
    assert events[-1] == "[DONE]" and text_of(events) == "one two three"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [event["choices"][0]["finish_reason"] for event in events[:-2]][-2:] == [None, "stop"]
    assert events[-2]["choices"] == [] and events[-2]["usage"]["completion_tokens"] == 3
    assert {event["id"] for event in events[:-1]} == {events[0]["id"]}


def test_openais_client_understands_it(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "anymal"
    messages: Any = [{"role": "developer", "content": "short"}, {"role": "user", "content": "what"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert whole.choices[0].message.content == "one two" and whole.choices[0].finish_reason == "length"
    stream = client.chat.completions.create(model="tiny", messages=messages, stream=True, stop=["three"])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "one two"
    with pytest.raises(openai.NotFoundError, match="no model 'other'") as missing:
        client.chat.completions.create(model="other", messages=messages)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def part(kind: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"type": kind, kind: fields}]


GOOD = {
    "text part": [{"type": "text", "text": "what"}],
    "image": [*part("image_url", url=f"data:image/png;base64,{PICTURE}"), {"type": "text", "text": "what"}],
    "image in auto detail": part("image_url", url=f"data:image/png;base64,{PICTURE}", detail="auto"),
    "bare base64": part("image_url", url=PICTURE),
    "any kind": part("input_imu", data=PICTURE, format="npy", rate=50),
}


@pytest.mark.parametrize("name", GOOD)
def test_content_parts(name: str, served: Served) -> None:
    reply = served.post(ask(GOOD[name]))
    assert reply.status_code == 200, reply.text


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no model": ({"messages": [{"role": "user", "content": "a"}]}, "model", "must name a model"),
    "no messages": ({"model": "tiny"}, "messages", "must be a list"),
    "several answers": (ask(n=3), "n", "not supported"),
    "true is not one": (ask(n=True), "n", "not supported"),
    "penalty": (ask(frequency_penalty=0.5), "frequency_penalty", "not supported"),
    "tools": (ask(tools=[{"type": "function"}]), "tools", "not supported"),
    "misspelt": (ask(max_token=3), "max_token", "Did you mean max_tokens?"),
    "both limits": (ask(max_tokens=3, max_completion_tokens=3), "max_tokens", "newer name"),
    "over the limit": (ask(max_tokens=9), "max_tokens", "--max-new-tokens=8"),
    "no tokens": (ask(max_tokens=0), "max_tokens", "at least 1"),
    "text for a number": (ask(temperature="warm"), "temperature", "a number"),
    "cold": (ask(temperature=-1), "temperature", "0 (greedy) or above"),
    "top_p": (ask(top_p=1.5), "top_p", "at most 1"),
    "seed": (ask(seed=1.5), "seed", "an integer"),
    "stop": (ask(stop=[1]), "stop", "a list of at most"),
    "empty stop": (ask(stop=""), "stop", "not empty"),
    "stream": (ask(stream="yes"), "stream", "true or false"),
    "stream options": (ask(stream_options={"include_usage": True}), "stream_options", "only a stream"),
    "role": ({"model": "tiny", "messages": [{"role": "robot", "content": "a"}]}, "messages", "'robot'"),
    "tool call": (
        {"model": "tiny", "messages": [{"role": "user", "content": "a", "tool_calls": []}]},
        "messages[0].tool_calls",
        "not supported",
    ),
    "last turn": ({"model": "tiny", "messages": [{"role": "assistant", "content": "a"}]}, "messages", "end with"),
    "empty": (ask(""), "messages", "empty content"),
    "number": (ask(3), "messages[0].content", "a text or a list"),
    "unknown part": (ask([{"type": "file"}]), "messages[0].content[0].type", "text, image_url, input_image, input_imu"),
    "part of another kind": (ask(part("input_audio", data="AA==")), "messages[0].content[0].type", "'audio'"),
    "remote": (ask(part("image_url", url="https://a.b/c.png")), "messages[0].content[0].image_url.url", "not fetch"),
    "file": (ask(part("image_url", url="file:///etc/passwd")), "messages[0].content[0].image_url.url", "not fetch"),
    "not base64": (
        ask(part("image_url", url="data:image/png;base64,@@")),
        "messages[0].content[0].image_url.url",
        "64",
    ),
    "no base64": (
        ask(part("image_url", url="data:image/png,AA")),
        "messages[0].content[0].image_url.url",
        "has the form",
    ),
    "detail": (ask(part("image_url", url="AA==", detail="high")), "messages[0].content[0].image_url.detail", "auto"),
    "no data": (ask(part("input_imu", rate=3)), "messages[0].content[0].input_imu.data", "a string"),
    "reserved": (ask(part("input_imu", data="AA==", media="x")), "messages[0].content[0].input_imu.media", "unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_cannot_be_used_is_named(name: str, served: Served) -> None:
    body, param, words = REFUSED[name]
    reply = served.post(body)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b"[]", "application/json", 400, "a JSON object"),
        (b'{"a": 1, "a": 2}', "application/json", 400, "'a'"),
        (b"[" * 1000, "application/json", 400, "deeper"),
        (b"\xff{}", "application/json", 400, "UTF-8"),
        (b"{}", "text/plain", 415, "application/json"),
        (b" " * 200_001, "application/json", 413, "--max-body-mb"),
    ],
)
def test_a_body_that_cannot_be_read(content: bytes, kind: str, status: int, words: str, served: Served) -> None:
    url, headers = f"{served.url}/v1/chat/completions", {"Content-Type": kind}
    for sent in (content, iter([content])):
        reply = httpx.post(url, content=sent, headers=headers, timeout=240)
        assert reply.status_code == status and words in reply.json()["error"]["message"], reply.text
    assert served.service.in_flight == 0


def test_fields_without_effect_are_accepted(served: Served) -> None:
    fields = {"user": "a", "metadata": {"b": "c"}, "n": 1, "frequency_penalty": 0.0, "tools": None, "logprobs": False}
    assert served.post(ask(**fields, response_format={"type": "text"})).status_code == 200


def test_other_paths_and_methods(served: Served) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/docs", 404)):
        reply = httpx.request(method, served.url + path)
        assert reply.status_code == status and path in reply.json()["error"]["message"]
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "running": 0, "waiting": 0, "requests": 0}
