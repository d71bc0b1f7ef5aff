# ruff: noqa: RUF001  (the paper's quotation marks)
"""AnyMAL's prompts (section E.1), as printed in the paper, including its typos.

`\\n` in the paper is a line break. `{media}` marks the position of the media: `<audio>`, `<video>` and `<IMU>` in the
paper, or the end of the sentence that announces the image. `{question}` and the like are texts of the task, including
the paper's `[options]`. The answer format ("in one word") is part of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_anymal.data.records import DataError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """The system and user messages for a kind of task."""

    # The benchmarks that use this prompt.
    tasks: tuple[str, ...]
    # Modality of the media.
    modality: str
    # System message, with {media} and other {names} of texts to be filled in.
    system: str
    # User message, with {names} of texts to be filled in.
    user: str

    @property
    def fields(self) -> set[str]:
        """Names of the texts that a task must provide."""
        return set(_FIELD.findall(self.system + self.user)) - {"media"}


PROMPTS = (
    PromptTemplate(
        tasks=("mm-it",),
        modality="image",
        system="You are a multimodal assistant, designed to provide helpful answers to users’ image-related questions. "
        "\n\n Here is the image: {media}",
        user="{question}",
    ),
    PromptTemplate(
        tasks=("vqa", "textvqa", "okvqa"),
        modality="image",
        system="You are a multimodal assistant, designed to provide direct answers to users’ image-related questions. "
        "Reply directly with only one phrase. *Do not* start your answer with ‘Sure ...’. "
        "\n\n Here is the image: {media}",
        user="In the image, {question} Reply in one word.",
    ),
    PromptTemplate(
        tasks=("vizwiz",),
        modality="image",
        system="Answer the questions based on the image when possible, otherwise say ‘unanswerable’. "
        "\n\n Here is the image: {media}",
        user="In the image, {question} Reply in one prahse/word or say ‘unanswerable’",
    ),
    PromptTemplate(
        tasks=("hateful-meme",),
        modality="image",
        system="You are a social media content moderator, designed to detect hateful memes. "
        "\n\n Here is the meme: {media}\n This meme contains text: ‘{ocr}’",
        user="Is this a hateful meme? Answer yes or no.",
    ),
    PromptTemplate(
        tasks=("coco-caption",),
        modality="image",
        system="You are a multimodal assistant, designed to provide direct and concise answers to users’ image-related "
        "requests. \n\n Here is the image: {media}",
        user="Describe the image with one *generic* sentence using json format. Here are two examples:\n "
        'Specific: {"caption": "Body-Solid (Best Fitness) Inversion Table-2"} \n '
        'Generic: {"caption": "A man laying on top of an exercise table."}',
    ),
    PromptTemplate(
        tasks=("mmmu", "chartqa", "ai2d"),
        modality="image",
        system="Given the image, choose the correct option for the following question. Your response must be just a "
        "single letter that corresponds to the correct option (e.g. A, B) \n\n Here is the image: {media}",
        user="{context} Question: {question} \n\n Options: {choices} \n\n Reply in a single letter.",
    ),
    PromptTemplate(
        tasks=("audiocap",),
        modality="audio",
        system="You are a multimodal assistant. Designed to provide direct answers to users’ audio-related questions. "
        "Here is the audio: {media}",
        user="Describe the sound.",
    ),
    PromptTemplate(
        tasks=("egoschema", "mvbench"),
        modality="video",
        system="You are a multimodal assistant. Designed to provide direct answers to users’ video-related questions. "
        "\n\n Here is the video: {media}",
        user="{question} Select exactly one option from the following: {options}.",
    ),
    PromptTemplate(
        tasks=("imu-ego4d",),
        modality="imu",
        system="You are a multimodal assistant, designed to provide helpful, concise and direct answers to users’ "
        "questions, based on the user’s motion sensor signals reading from a head-mounted IMU device. The signals may "
        "indicate that a user may be running, walking, biking, driving, looking around, etc. Always answer under 30 "
        "words. \n\n Here are the user’s predicted motions: {media}",
        user="Describe this motion.",
    ),
)
BY_TASK = {task: prompt for prompt in PROMPTS for task in prompt.tasks}


def messages_from_prompt(task: str, media: Sequence[dict[str, Any]], **texts: str) -> list[dict[str, Any]]:
    """Build the `messages` of a sample up to the user turn; add the answer, or `chosen` and `rejected`.

    Args:
        task: a key of BY_TASK.
        media: the media parts, for example {"media": "cat.jpg"}; `modality` defaults to that of the prompt.
        texts: the texts named by the prompt's `fields`, such as `question`.

    Raises:
        DataError: the task is unknown, there are no media, or a text is missing or not a field of the prompt.
    """
    if task not in BY_TASK:
        raise DataError(f"There is no prompt for the task {task!r}. Use one of {', '.join(BY_TASK)}.")
    prompt = BY_TASK[task]
    if not media:
        raise DataError(f"The prompt of {task!r} needs media. Add at least one part, for example {{'media': NAME}}.")
    if set(texts) != prompt.fields:
        wanted, given = (", ".join(sorted(names)) or "none" for names in (prompt.fields, set(texts)))
        raise DataError(f"The prompt of {task!r} takes these texts: {wanted}; given: {given}.")
    before, after = prompt.system.split("{media}")
    items = [{"modality": prompt.modality, **item} for item in media]
    texts_around = [{"text": _fill(before, texts)}, *items, {"text": _fill(after, texts)}]
    system = [part for part in texts_around if part.get("text") != ""]
    return [{"role": "system", "content": system}, {"role": "user", "content": _fill(prompt.user, texts)}]


def _fill(template: str, texts: dict[str, str]) -> str:
    return _FIELD.sub(lambda match: texts[match[1]], template)
