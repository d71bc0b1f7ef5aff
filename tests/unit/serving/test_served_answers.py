"""Concurrent clients with text, images, videos, audio and IMU signals get the answers of `anymal generate`."""

from __future__ import annotations

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from chat_service import Served, ask, chunks, serving, text_of
from hf_parts import video
from served_models import export_generator
from tiny import flac, npy, png

from megatron_anymal.data.prompt_encoder import MediaFile, open_parts
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling

# Type of a content part, and the data set's part, for each kind of media.
KINDS = {
    "image": ("image_url", "image/png", lambda n: png(n, (9 + n, 9)), {}),
    "video": ("video_url", "video/mp4", lambda n: video(n, 12 + n), {}),
    "audio": ("input_audio", "flac", lambda n: flac(n, 0.5 + n / 30), {}),
    "imu": ("input_imu", "npy", lambda n: npy(n, 60 + 4 * n), {"rate": 50}),
}
WORDS = ["what", "is", "this", "zero", "one", "two", "seven", "a", "sound", "a", "motion", "a", "run"]


def question(number: int) -> tuple[list[dict[str, Any]], Prompt]:
    """Content of a request, and the same prompt as `anymal generate --prompts` reads it."""
    text = " ".join(WORDS[number % 5 : number % 5 + 1 + number % 7])
    kinds = [list(KINDS)[number % 4]] if number % 6 else list(KINDS)
    if number % 6 == 1:
        kinds = []
    parts: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    files = []
    for kind in kinds:
        name, form, make, attributes = KINDS[kind]
        data = make(number)
        encoded = base64.b64encode(data).decode()
        value = {"url": f"data:{form};base64,{encoded}"} if "url" in name else {"data": encoded, "format": form}
        parts.append({"type": name, name: {**value, **attributes}})
        own.append({"media": f"file.{form.split('/')[-1]}", "modality": kind, **attributes})
        files.append(MediaFile(data, form.split("/")[-1]))
    content = [*own, {"text": text}]
    prompt = Prompt(open_parts({"messages": [{"role": "user", "content": content}]}, ""), files)
    return [*parts, {"type": "text", "text": text}], prompt


@pytest.fixture(scope="module")
def generator(tokenizer_folder: str) -> ExportedGenerator:
    return export_generator(tokenizer_folder)


def test_concurrent_clients_get_the_answers_of_each_request_alone(generator: ExportedGenerator) -> None:
    questions = [question(number) for number in range(32)]
    settings = [
        {"max_tokens": 4 + 3 * (n % 6), **({"temperature": 1.1, "top_p": 0.9, "seed": n} if n % 5 == 4 else {})}
        for n in range(len(questions))
    ]
    expected = []
    for (_, prompt), given in zip(questions, settings):
        own = {"max_new_tokens" if name == "max_tokens" else name: value for name, value in given.items()}
        expected.append(generator.answer([prompt], Sampling(**own))[0].strip())
    assert len(set(expected)) > 24, "too few distinct answers"
    barrier = threading.Barrier(64)

    def client(number: int) -> str:
        content, stream = questions[number % 32][0], number < 32
        barrier.wait(240)
        reply = served.post(ask(content, stream=stream, **settings[number % 32]))
        assert reply.status_code == 200, reply.text
        return text_of(chunks(reply.iter_lines())) if stream else reply.json()["choices"][0]["message"]["content"]

    with serving(generator) as served, ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(client, range(64)))
    assert answers == [*expected, *expected]


BROKEN = {
    "image": {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    "video": {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
    "audio": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    "imu": {"type": "input_imu", "input_imu": {"data": "AAAA", "format": "npy", "rate": 50}},
    "imu without rate": {
        "type": "input_imu",
        "input_imu": {"data": base64.b64encode(npy(1)).decode(), "format": "npy", "rate": "fast"},
    },
}


@pytest.fixture(scope="module")
def served(generator: ExportedGenerator) -> Any:
    with serving(generator) as running:
        yield running


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_media_are_refused_by_their_part(name: str, served: Served) -> None:
    reply = served.post(ask([{"type": "text", "text": "what"}, BROKEN[name]]))
    error = reply.json()["error"]
    assert reply.status_code == 400, reply.text
    assert f"messages[0].content[1].{BROKEN[name]['type']}" in error["message"] and error["param"] == "messages"


def test_usage_counts_soft_tokens(served: Served, generator: ExportedGenerator) -> None:
    content, prompt = question(6)
    usage = served.post(ask(content, max_tokens=3)).json()["usage"]
    assert usage["prompt_tokens"] == generator._inputs([prompt])["input_ids"].size(1)
