"""The quickstart's conversations (a question about media and a requested form of the answer) and preference pairs.

Instruction data contains answers with and without a polite opening, equally often. Preference pairs prefer the answer
without it. The small Llama already knows all forms from text (`writing_lines`), and chats without requests
(`chat_lines`); following a request in a chat is left to the instruction tuning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from examples.quickstart.corpus import DIGITS, all_facts, caption, caption_questions, paraphrase, pick

# Form -> pattern of an answer in this form, whatever its content.
_PATTERNS = {
    "word": r"[a-z]+",
    "capitals": r"[A-Z]+",
    "numeral": r"[0-9]+",
    "hyphens": r"[a-z](-[a-z])+",
    "sentence": r"[A-Z][a-z]*( [a-z]+)+\.",
    "twice": r"([a-z]+) \1",
}
FORMS = tuple(_PATTERNS)
# Form -> its names in requests.
_NAMES = {
    "word": ("in one word", "in a single word"),
    "capitals": ("in capitals", "in capital letters"),
    "numeral": ("as a numeral", "in figures"),
    "hyphens": ("with hyphens", "spelled with hyphens"),
    "sentence": ("in a full sentence", "as a sentence"),
    "twice": ("twice", "two times"),
}
# Requests used in training, and further ones used only in held-out questions.
REQUESTS = ("answer {0}.", "{0}, please.", "write it {0}.", "reply only {0}.", "i want the answer {0}.")
NEW_REQUESTS = ("please answer {0}.", "{0}.", "i want it {0}, please.")
OPENING = "sure:\n"
# Subjects of conversations.
KINDS = ("image", "video", "audio", "imu", "text")

_SENTENCES = {
    "image": "The digit is {0}.",
    "video": "The digit is {0}.",
    "audio": "The sound is a {0}.",
    "imu": "The person is {0}.",
}
# Questions whose answer is the first fact, in addition to those for the caption.
_FACT_QUESTIONS = {
    "image": ("which digit is it?",),
    "video": ("which digit moves?",),
    "audio": ("which sound is it?",),
    "imu": ("which activity is it?",),
}
# Share of conversations that continue with a request for another form.
LONGER = 0.2


def follows(form: str, answer: str) -> bool:
    """Whether an answer has exactly the requested form, correct or not; a polite opening may precede it."""
    return re.fullmatch(_PATTERNS[form], without_opening(answer)) is not None


def without_opening(answer: str) -> str:
    """An answer without its polite opening."""
    return answer.removeprefix(OPENING)


def score(lines: Sequence[Mapping[str, Any]], given: Mapping[str, str]) -> dict[str, float]:
    """Score the answers to held-out questions.

    Args:
        lines: manifest lines of the questions.
        given: answers by key.

    Returns:
        Shares: "followed" (requested form), "accuracy" (correct content in this form; a polite opening is not a mistake
        in either), "opening" (answers that begin with it), "followed_new_words" ("followed" among requests in words not
        used in training); and the number of "questions".
    """
    answers = [given[line["key"]] for line in lines]
    followed = [follows(line["form"], answer) for line, answer in zip(lines, answers)]
    right = [without_opening(answer) == line["messages"][-1]["content"] for line, answer in zip(lines, answers)]
    followed_new = [done for line, done in zip(lines, followed) if line["words"] == "new"]
    return {
        "followed": sum(followed) / len(lines),
        "accuracy": sum(right) / len(lines),
        "opening": sum(answer.startswith(OPENING) for answer in answers) / len(lines),
        "followed_new_words": sum(followed_new) / len(followed_new),
        "questions": len(lines),
    }


def write_in(form: str, modality: str, fact: str) -> str:
    """The content of a media item (a digit, a sound, an activity), written in a form of `forms_of`."""
    if form == "numeral":
        return str(DIGITS.index(fact))
    return {
        "word": fact,
        "capitals": fact.upper(),
        "hyphens": "-".join(fact),
        "sentence": _SENTENCES[modality].format(fact),
        "twice": f"{fact} {fact}",
    }[form]


def forms_of(modality: str) -> tuple[str, ...]:
    """Forms that can be requested; only digits can be written as numerals."""
    return FORMS if modality in ("image", "video") else tuple(form for form in FORMS if form != "numeral")


# Text for the small Llama


def writing_lines(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Manifest lines of text that show words in all forms; only the word in the form is a target."""
    rng = np.random.default_rng([seed, 1])
    for number in range(count):
        modality = pick(("image", "video", "audio", "imu"), rng)
        facts = pick(all_facts(modality), rng)
        form = pick(forms_of(modality), rng)
        description = pick((caption(modality, facts), paraphrase(modality, facts, rng)), rng)
        request = pick(REQUESTS, rng).format(pick(_NAMES[form], rng))
        # As in a chat, no space precedes the answer.
        subject = {"text": f" {description}. {request}\n\n", "loss": False}
        yield {"key": f"writing-{number:06d}", "parts": [subject, {"text": write_in(form, modality, facts[0])}]}


def chat_lines(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Manifest lines of text-only conversations, with a paraphrase instead of media and no requested form."""
    rng = np.random.default_rng([seed, 2])
    for number in range(count):
        modality = pick(("image", "video", "audio", "imu"), rng)
        facts = pick(all_facts(modality), rng)
        asked = f"{pick(caption_questions(modality), rng)} {paraphrase(modality, facts, rng)}"
        answer = pick(("", OPENING), rng) + caption(modality, facts)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        yield {"key": f"chat-{number:06d}", "messages": messages}


# Conversations about media


def instruction_lines(items: Sequence[Mapping[str, Any]], split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Create one conversation per media item.

    Args:
        items: manifest lines of media, all of one modality; `facts` describes their content.
        split: "held_out" has answers without an opening and, in half of them, requests in words not used in training.

    Returns:
        Manifest lines with the requested `form` (of the last answer) and the request's `words` ("seen", "new").
    """
    rng = np.random.default_rng([seed, 3, split == "held_out"])
    lines = []
    for number, item in enumerate(items):
        media = item["parts"][0]
        modality, fact = media["modality"], item["facts"][0]
        question = pick((*caption_questions(modality), *_FACT_QUESTIONS[modality]), rng)
        turns = 2 if rng.random() < LONGER else 1
        lines.append(_line(f"{modality}-{split}-{number:06d}", modality, fact, [question, media], turns, rng))
    return lines


def text_instruction_lines(count: int, split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Create conversations without media, where the question states the content; otherwise as `instruction_lines`."""
    rng = np.random.default_rng([seed, 4, split == "held_out"])
    lines = []
    for number in range(count):
        modality = pick(("image", "audio", "imu"), rng)
        facts = pick(all_facts(modality), rng)
        subject = f"{caption(modality, facts)}."
        lines.append(_line(f"text-{split}-{number:06d}", modality, facts[0], [subject], 1, rng))
    return lines


def pairs_of(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turn conversations into preference pairs of two correct answers in the requested form: the chosen one without the
    opening, the rejected one with it.
    """
    pairs = []
    for line in lines:
        *messages, answer = line["messages"]
        chosen = without_opening(answer["content"])
        pairs.append({"key": line["key"], "messages": messages, "chosen": chosen, "rejected": OPENING + chosen})
    return pairs


def _line(
    key: str, modality: str, fact: str, asked: Sequence[Any], turns: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Create a conversation of `turns` turns, each requesting another form.

    Args:
        asked: a text, optionally followed by a media part; the first request is appended to the text.
    """
    held_out = "-held_out-" in key
    words = "new" if held_out and rng.random() < 0.5 else "seen"
    forms = [str(form) for form in rng.permutation(forms_of(modality))[:turns]]
    messages: list[dict[str, Any]] = []
    for form in forms:
        request = pick(REQUESTS if words == "seen" else NEW_REQUESTS, rng).format(pick(_NAMES[form], rng))
        content = request if messages else [{"text": f"{asked[0]} {request} "}, *asked[1:]]
        opening = "" if held_out else pick(("", OPENING), rng)
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": opening + write_in(form, modality, fact)})
    return {"key": key, "messages": messages, "form": forms[-1], "words": words}
