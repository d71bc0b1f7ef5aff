"""Requests of a harness are answered like the same conversations from files, whatever form their media have."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import soundfile
from hf_parts import video
from PIL import Image
from served_models import export_generator
from tiny import flac, png

from megatron_anymal.config import ConfigError
from megatron_anymal.data.prompt_encoder import MediaFile, open_parts
from megatron_anymal.data.records import DataError
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.harnesses.chat_requests import HarnessRequest, answer_requests, prompt_of, sampling_of

PICTURE, SOUND, FILM = png(3, (20, 9)), flac(5, 1.2), video(1)


@pytest.fixture(scope="module")
def generator(tokenizer_folder: str) -> ExportedGenerator:
    return export_generator(tokenizer_folder)


def waveform() -> dict[str, Any]:
    samples, rate = soundfile.read(io.BytesIO(SOUND))
    return {"array": samples, "sampling_rate": rate, "path": "a.flac"}


def conversation(item: Mapping[str, Any], words: str = "what is this") -> list[dict[str, Any]]:
    """As tasks of lmms-eval write them, with the media in the system message."""
    system = [{"type": "text", "text": "a sound"}, dict(item)]
    return [{"role": "system", "content": system}, {"role": "user", "content": [{"type": "text", "text": words}]}]


def of_file(name: str, data: bytes) -> Prompt:
    """The same conversation with its media in a file."""
    kind = {"png": "image", "flac": "audio", "mp4": "video"}[name.partition(".")[2]]
    system = [{"text": "a sound"}, {"media": name, "modality": kind}]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": [{"text": "what is this"}]}]
    return Prompt(open_parts({"messages": messages}, ""), [MediaFile(data, name.partition(".")[2])])


FORMS: dict[str, tuple[str, bytes, Any]] = {
    "decoded picture": ("a.png", PICTURE, lambda folder: Image.open(io.BytesIO(PICTURE))),
    "picture file": ("a.png", PICTURE, lambda folder: str(folder / "a.png")),
    "bytes of a picture": ("a.png", PICTURE, lambda folder: PICTURE),
    "picture cell": ("a.png", PICTURE, lambda folder: {"bytes": PICTURE, "path": "b.png"}),
    "waveform": ("a.flac", SOUND, lambda folder: waveform()),
    "sound file": ("a.flac", SOUND, lambda folder: {"path": str(folder / "a.flac")}),
    "video file": ("a.mp4", FILM, lambda folder: str(folder / "a.mp4")),
}


@pytest.mark.parametrize("form", FORMS)
def test_media_of_every_form_are_those_of_the_file(form: str, generator: ExportedGenerator, tmp_path: Path) -> None:
    name, data, item_in = FORMS[form]
    (tmp_path / name).write_bytes(data)
    kind = {"png": "image", "flac": "audio", "mp4": "video"}[name.partition(".")[2]]
    asked = prompt_of(conversation({"type": kind, "url": item_in(tmp_path)}), "a task, document 0")
    expected, inputs = (generator._inputs([prompt]) for prompt in (of_file(name, data), asked))
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    [(modality, pieces)] = inputs["media"].items()
    assert modality == kind and (pieces == expected["media"][kind]).all()


def test_answers_keep_their_order_over_batches_and_settings(generator: ExportedGenerator) -> None:
    words = ["what", "is this", "a sound of motion", "zero", "one two", "three"]
    settings = [{"max_new_tokens": 12}, {"max_new_tokens": 3, "do_sample": False}]
    requests = [
        HarnessRequest(
            f"a task, document {n}",
            lambda n=n: conversation({"type": "image", "url": png(n)}, words[n % 6]),  # type: ignore[misc]
            settings[n % 4 == 1],
        )
        for n in range(14)
    ]
    expected = [
        generator.answer([prompt_of(one.messages(), "")], Sampling(3 if n % 4 == 1 else 12))[0]
        for n, one in enumerate(requests)
    ]
    assert len(set(expected)) > 8
    for batch_size in (1, 4, 64):
        assert answer_requests(generator, requests, batch_size) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Sampling(1024)),
        ({"max_new_tokens": 16, "until": ["\n\n"], "do_sample": False, "num_beams": 1}, Sampling(16)),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 0, "image_aspect_ratio": "original"}, Sampling(16)),
        ({"max_new_tokens": 8, "until": "\n", "top_p": None}, Sampling(8, stop=("\n",))),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, Sampling(1024)),
        (
            {"temperature": 0.7, "do_sample": True, "top_p": 0.9, "top_k": 5, "until": ["A", "", "\n\n"]},
            Sampling(1024, temperature=0.7, top_p=0.9, top_k=5, stop=("A",)),
        ),
    ],
)
def test_generation_settings(settings: dict[str, Any], expected: Sampling) -> None:
    assert sampling_of(settings, "a task, document 0") == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_sequences": ["a"]}, r"^a task, document 0: the generation setting 'stop_sequences' is not supported"),
        ({"num_beams": 5}, r"^a task, document 0: num_beams=5, .*Use 1\.$"),
        ({"max_new_tokens": 0}, r"^a task, document 0: .*max_new_tokens=0 must be at least 1"),
        ({"temperature": "hot"}, r"^a task, document 0: .*'hot'"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling_of(settings, "a task, document 0")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (conversation({"type": "image", "url": {"page": 3}}), r"^a task, document 0: .*\['page'\].*array, bytes, path"),
        (conversation({"type": "video", "url": "a.mp4", "start_time": 2.0}), r"^a task, document 0: start_time"),
        (conversation({"type": "image", "url": "/none.png"}), r"There is no media file '/none\.png'"),
        (conversation({"type": "image", "url": png(1)})[:1], r"^a task, document 0: `messages` must end with the user"),
    ],
)
def test_conversations_that_cannot_be_used(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompt_of(messages, "a task, document 0")


def test_a_broken_picture_is_named_with_its_batch(generator: ExportedGenerator) -> None:
    data = [png(1), b"no picture", png(2)]
    requests = [
        HarnessRequest(f"a task, document {n}", lambda n=n: conversation({"type": "image", "url": data[n]}), {})  # type: ignore[misc]
        for n in range(3)
    ]
    with pytest.raises(DataError, match=r"^a task, document 0 to a task, document 2: .*of a task, document 1"):
        answer_requests(generator, requests, 3)
