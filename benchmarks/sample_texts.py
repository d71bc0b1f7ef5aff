"""Captions, conversations and preference pairs of realistic lengths, for generated data.

Lengths in words, uniform: captions 20 to 200, one in twenty 300 to 1200; instructions 10 to 60 with answers of 20 to
200, one in four with two turns; preference pairs 10 to 60 with two answers of 30 to 250.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# Returns a text of a length between two bounds.
Text = Callable[[int, int], str]


def caption(rng: np.random.Generator, media: dict[str, Any], text: Text) -> dict[str, Any]:
    """A sample of alignment."""
    return {"parts": [media, {"text": text(300, 1200) if rng.random() < 0.05 else text(20, 200)}]}


def conversation(rng: np.random.Generator, media: dict[str, Any], text: Text) -> dict[str, Any]:
    """A sample of instruction tuning."""
    messages = [_question(media, text), {"role": "assistant", "content": text(20, 200)}]
    if rng.random() < 0.25:
        messages.append({"role": "user", "content": text(10, 60)})
        messages.append({"role": "assistant", "content": text(20, 200)})
    return {"messages": messages}


def pair(rng: np.random.Generator, media: dict[str, Any], text: Text) -> dict[str, Any]:
    """A preference pair."""
    # Distinct last words keep the two answers different, however short they are in a dry run.
    return {
        "messages": [_question(media, text)],
        "chosen": f"{text(30, 250)} w1",
        "rejected": f"{text(30, 250)} w2",
    }


def _question(media: dict[str, Any], text: Text) -> dict[str, Any]:
    return {"role": "user", "content": [{"text": text(10, 60)}, media]}


# By job.
SAMPLES = {"pretrain": caption, "sft": conversation, "dpo": pair}
