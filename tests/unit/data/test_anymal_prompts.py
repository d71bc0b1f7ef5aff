"""AnyMAL's prompts become messages that a sample can hold."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_anymal.data.anymal_prompts import BY_TASK, PROMPTS, messages_from_prompt
from megatron_anymal.data.records import DataError, MediaPart, TextPart
from megatron_anymal.data.samples import media_entries, parse_sample


@pytest.mark.parametrize("task", BY_TASK)
def test_every_prompt_makes_a_sample(task: str) -> None:
    prompt = BY_TASK[task]
    texts = {name: f"the {name} {{question}} of {{media}}" for name in sorted(prompt.fields)}
    messages = messages_from_prompt(task, [{"media": "a"}, {"media": "b", "modality": "other", "rate": 5}], **texts)
    value: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": "yes"}]}
    [parts] = parse_sample(value, task).documents
    media = [part for part in parts if isinstance(part, MediaPart)]
    assert media == [MediaPart("a", prompt.modality), MediaPart("b", "other", {"rate": 5})]
    assert [entry["media"] for entry in media_entries(value)] == ["a", "b"]
    part_texts = [part.text for part in parts if isinstance(part, TextPart) and not part.control]
    # Every text of the task appears once, unchanged; nothing is filled in twice.
    for text in texts.values():
        assert sum(one.count(text) for one in part_texts) == 1
    # The media follow directly after the words that announce them.
    before = parts[parts.index(media[0]) - 1]
    assert isinstance(before, TextPart) and re.search(r"Here (is|are) the [\w’ ]+: $", before.text)  # noqa: RUF001
    assert [message["role"] for message in messages] == ["system", "user"]


def test_wording() -> None:
    assert len(PROMPTS) == 9 and len(BY_TASK) == 14
    system, user = messages_from_prompt("textvqa", [{"media": "a.png"}], question="what is it?")
    assert user == {"role": "user", "content": "In the image, what is it? Reply in one word."}
    assert system["content"] == [
        {
            "text": "You are a multimodal assistant, designed to provide direct answers to users’ image-related "  # noqa: RUF001
            "questions. Reply directly with only one phrase. *Do not* start your answer with ‘Sure ...’. "  # noqa: RUF001
            "\n\n Here is the image: "
        },
        {"modality": "image", "media": "a.png"},
    ]
    meme = messages_from_prompt("hateful-meme", [{"media": "a.png"}], ocr="ha")[0]["content"]
    assert [part.get("text") for part in meme][1:] == [None, "\n This meme contains text: ‘ha’"]  # noqa: RUF001
    caption = messages_from_prompt("coco-caption", [{"media": "a.png"}])[1]["content"]
    assert '{"caption": "Body-Solid (Best Fitness) Inversion Table-2"}' in caption


def test_mistakes() -> None:
    with pytest.raises(DataError, match=r"'vqa2'.*textvqa"):
        messages_from_prompt("vqa2", [{"media": "a"}], question="x")
    with pytest.raises(DataError, match=r"'vqa' needs media"):
        messages_from_prompt("vqa", [], question="x")
    with pytest.raises(DataError, match=r"takes these texts: choices, context, question; given: question"):
        messages_from_prompt("mmmu", [{"media": "a"}], question="x")
    with pytest.raises(DataError, match=r"takes these texts: none; given: question"):
        messages_from_prompt("audiocap", [{"media": "a"}], question="x")
