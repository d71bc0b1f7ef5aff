"""Tasks of lmms-eval with AnyMAL's prompt for VQA (section E.1), which puts the picture into the system message, and
with the question and the picture as a user's turn.

The messages are lmms-eval's own, so that every chat model can be asked. VQA accuracy is computed by lmms-eval.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from megatron_anymal.data.anymal_prompts import messages_from_prompt


def messages(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation about a row's picture, up to the answer."""
    turns = messages_from_prompt("vqa", [{"media": "picture"}], question=document["question"])
    picture = _picture(document)
    return [{"role": turn["role"], "content": _content(turn["content"], picture)} for turn in turns]


def chat_messages(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A user's turn with a row's question and picture, as in the quickstart's conversations."""
    return [{"role": "user", "content": _content([{"text": document["question"]}, {}], _picture(document))}]


def targets(document: Mapping[str, Any]) -> list[str]:
    """The annotators' answers."""
    return [entry["answer"] for entry in document["answers"]]


def scores(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """VQA accuracy of the answer's first line."""
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    return vqav2_process_results_val(document, [results[0].strip().partition("\n")[0]])


def exact_answers(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the answer is the first annotator's, as `anymal evaluate --data` compares them."""
    return {"exact_match": float(results[0].strip() == document["answers"][0]["answer"])}


def _picture(document: Mapping[str, Any]) -> Any:
    cell = document["image"]
    # Columns of the hub are decoded already.
    return Image.open(io.BytesIO(cell["bytes"])) if isinstance(cell, Mapping) else cell


def _content(content: Any, picture: Any) -> list[dict[str, Any]]:
    parts = [{"text": content}] if isinstance(content, str) else content
    return [
        {"type": "text", "text": part["text"]} if "text" in part else {"type": "image", "url": picture}
        for part in parts
    ]
