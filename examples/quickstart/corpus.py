"""The quickstart's text: descriptions of each kind of media, the small Llama's training corpus and its tokenizer.

The Llama is trained on `{paraphrase}. question: ... answer: ...`. In alignment, soft tokens replace the paraphrase, so
the projectors only have to learn its content, and the Llama stays frozen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from megatron_anymal.data.chat_format import BEGIN, END_HEADER, END_TURN, ROLES, START_HEADER

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")
SOUNDS = ("siren", "beep", "whistle", "drum", "hum", "noise")
ACTIVITIES = ("walking", "running", "cycling", "resting")

END = "<|end_of_text|>"
# Separates words, numbers, punctuation and line breaks. Line breaks are never merged with the text after them, so a
# turn's header has the same ids for any content.
_SPLIT = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
RESERVED = tuple(f"<|reserved_special_token_{number}|>" for number in range(8))

# Wordings of the facts of each modality; {0} and {1} are the facts.
_PARAPHRASES = {
    "image": (
        "a picture of the digit {0}",
        "someone wrote the number {0} by hand",
        "a scan of the handwritten digit {0}",
        "the paper shows the digit {0}",
        "{0} in black ink",
        "here is the figure {0}",
    ),
    "video": (
        "a clip in which the digit {0} moves {1}",
        "the number {0} slides {1} across the frame",
        "the {0} goes {1}",
        "moving {1} there is the digit {0}",
        "{1} is where the figure {0} drifts",
        "in the video the {0} travels {1}",
    ),
    "audio": (
        "a recording of a {0}",
        "there is a {0} to be heard",
        "the microphone picked up a {0}",
        "{0} can be heard nearby",
        "one second of a {0}",
    ),
    "imu": (
        "the sensor was worn while {0}",
        "motion data of somebody {0}",
        "the wearer is {0}",
        "{0} with a phone in the pocket",
        "a person is {0} today",
    ),
}
_CAPTION_QUESTIONS = {
    "image": ("what is in the picture?", "describe the picture.", "what does the image show?"),
    "video": ("what happens in the video?", "describe the clip.", "what does the video show?"),
    "audio": ("what do you hear?", "describe the sound.", "what is in the recording?"),
    "imu": ("what does the person do?", "describe the motion.", "what does the sensor show?"),
}
_CAPTIONS = {
    "image": "the handwritten digit {0}",
    "video": "the digit {0} moving {1}",
    "audio": "the sound of a {0}",
    "imu": "a person {0}",
}
# Questions about one fact of the caption: modality -> (question, index of the fact that answers it).
_PART_QUESTIONS = {
    "image": (("which digit is it?", 0),),
    "video": (("which digit moves?", 0), ("which way does it move?", 1)),
    "audio": (("which sound is it?", 0),),
    "imu": (("which activity is it?", 0),),
}
# Questions that only the text corpus answers: modality -> (question, fact -> answer).
_EVEN = {digit: "odd" if position % 2 else "even" for position, digit in enumerate(DIGITS)}
_STILL = {activity: "no" if activity == "resting" else "yes" for activity in ACTIVITIES}
_KNOWLEDGE_QUESTIONS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "image": (("is the digit even or odd?", _EVEN),),
    "video": (("is the digit even or odd?", _EVEN),),
    "audio": (),
    "imu": (("does the person move?", _STILL),),
}


@dataclass(frozen=True)
class Turn:
    """A question about media and its answer."""

    # "caption" states all facts, "part" one of them, "knowledge" something that follows from them.
    kind: str
    question: str
    answer: str

    def parts(self) -> list[dict[str, Any]]:
        """Text content parts of a manifest line that follow the media; only the answer is a target."""
        return [{"text": f" question: {self.question} answer:", "loss": False}, {"text": f" {self.answer}"}]


def turns(modality: str, facts: Sequence[str]) -> list[Turn]:
    """All questions about a media item of "image", "video", "audio" or "imu".

    Args:
        facts: the digit; for video the digit and its direction; the sound; the activity.
    """
    all_turns = [Turn("caption", question, caption(modality, facts)) for question in caption_questions(modality)]
    all_turns += [Turn("part", question, facts[fact]) for question, fact in _PART_QUESTIONS[modality]]
    all_turns += [Turn("knowledge", question, words[facts[0]]) for question, words in _KNOWLEDGE_QUESTIONS[modality]]
    return all_turns


def caption(modality: str, facts: Sequence[str]) -> str:
    """All facts of a media item as text."""
    return _CAPTIONS[modality].format(*facts)


def caption_questions(modality: str) -> tuple[str, ...]:
    """Questions that a caption answers."""
    return _CAPTION_QUESTIONS[modality]


def paraphrase(modality: str, facts: Sequence[str], rng: np.random.Generator) -> str:
    """A random rewording of the facts, used instead of the media."""
    return pick(_PARAPHRASES[modality], rng).format(*facts)


def all_facts(modality: str) -> list[tuple[str, ...]]:
    """Every combination of facts of a modality; each has one distinct caption."""
    first = {"image": DIGITS, "video": DIGITS, "audio": SOUNDS, "imu": ACTIVITIES}[modality]
    return list(product(first, DIRECTIONS)) if modality == "video" else [(fact,) for fact in first]


def text_lines(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Text-only manifest lines with a paraphrase instead of media; only the answer is a target.

    With the whole text as target, learning the same answers takes twice as many steps. The modalities alternate; video,
    which is the hardest, comes twice per cycle.
    """
    rng = np.random.default_rng(seed)
    cycle = ("image", "video", "audio", "video", "imu")
    for number in range(count):
        modality = cycle[number % len(cycle)]
        facts = pick(all_facts(modality), rng)
        turn = pick(turns(modality, facts), rng)
        before = {"text": f" {paraphrase(modality, facts, rng)}.", "loss": False}
        yield {"key": f"text-{number:06d}", "parts": [before, *turn.parts()]}


def pick(choices: Sequence[Any], rng: np.random.Generator) -> Any:
    """Pick one of the choices uniformly at random."""
    return choices[int(rng.integers(len(choices)))]


def write_lines(path: str | Path, lines: Iterable[dict[str, Any]]) -> Path:
    """Write manifest lines as a JSONL manifest."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def train_tokenizer(manifests: Sequence[str | Path], folder: str | Path, vocab_size: int = 768) -> int:
    """Train a byte-level BPE tokenizer on the texts of manifests and save it as a HuggingFace folder.

    Encoding and decoding preserves any text; the tokenizer adds no special tokens on its own.

    Returns:
        The vocabulary size: at most `vocab_size`, less if the corpus has too few different words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, START_HEADER, END_HEADER, END_TURN, *RESERVED],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((*ROLES, *(text for path in manifests for text in _texts(Path(path)))), trainer)
    # No padding or unknown token is needed: documents are packed, and bytes cover every text.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(str(folder))
    return len(fast)


def _texts(manifest: Path) -> Iterator[str]:
    with manifest.open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            yield from (part["text"] for part in line.get("parts", ()) if "text" in part)
            yield from (message["content"] for message in line.get("messages", ()))
