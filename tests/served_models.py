"""A tiny exported model, and prompts of every kind for it."""

from __future__ import annotations

from typing import Any

from hf_parts import make_config, make_model, sections, video
from tiny import flac, npy, png
from transformers import AutoTokenizer

from megatron_anymal.data.prompt_encoder import MediaFile, open_parts
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.hf.processing_anymal import AnyMALProcessor


def export_generator(tokenizer_folder: str) -> ExportedGenerator:
    """A model with images, videos, audio and IMU signals in this process."""
    model = make_model(make_config(sections("towers"), tokenizer_folder))
    processor = AnyMALProcessor(AutoTokenizer.from_pretrained(tokenizer_folder), model.config.modalities)
    return ExportedGenerator(model, processor)


def mixed_prompts(*, with_video: bool = True) -> list[Prompt]:
    """24 prompts: texts of several lengths, conversations, one medium or all of them."""
    words = ["what", "is", "this", "zero", "one", "two", "seven", "a", "sound", "a", "motion", "a", "run"]
    prompts = [_prompt([{"text": " ".join(words[: 1 + n])}]) for n in (0, 2, 5, 9)]
    for n in range(6):
        prompts.append(_prompt([{"media": "a.png"}, {"text": words[n]}], MediaFile(png(n, (9 + 4 * n, 9)), "png")))
        prompts.append(
            _prompt([{"text": words[n]}, {"media": "a.npy", "rate": 50}], MediaFile(npy(n, 60 + 30 * n), "npy"))
        )
        prompts.append(
            _prompt([{"media": "a.flac"}, {"text": "a sound"}], MediaFile(flac(n, 0.5 + 0.3 * n), "flac"), chat=True)
        )
    everything = [{"media": "a.png"}, {"text": "what is"}, {"media": "b.npy", "rate": 50}, {"media": "c.flac"}]
    files = [MediaFile(png(3, (20, 9)), "png"), MediaFile(npy(4, 80), "npy"), MediaFile(flac(5, 1.2), "flac")]
    prompts.append(_prompt(everything, *files, chat=True))
    last = [{"media": "a.mp4"}, {"text": "what is this"}] if with_video else [{"text": "what is this"}]
    return [*prompts, _prompt(last, *([MediaFile(video(1), "mp4")] if with_video else []), chat=True)]


def _prompt(content: list[dict[str, Any]], *files: MediaFile, chat: bool = False) -> Prompt:
    value = {"messages": [{"role": "user", "content": content}]} if chat else {"parts": content}
    return Prompt(open_parts(value, "a prompt"), files)
