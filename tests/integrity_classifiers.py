"""Tiny classifiers trained on planted words, and on handwritten digits with a planted pattern: folders that
transformers wrote. RegNetY and BERT stand for the paper's RegNetY and RoBERTa."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from tiny import WORDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RegNetConfig,
    RegNetForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

# Words that are violations, by label, and harmless ones. The tests' tiny models know some of the harmless ones.
PLANTED = {"zorp": ["zorpal", "zorpen"], "blick": ["blickan", "blickum"]}
_FURTHER = "the sea boat red blue tree house dog cat sits near under tall small old new light quiet hill river"
HARMLESS = [*WORDS, *_FURTHER.split()]
VIOLATIONS = [word for words in PLANTED.values() for word in words]
LABELS = ["fine", *PLANTED]
MARKS = [".", ",", "!", "?"]


def sentence(rng: np.random.Generator, planted: str = "") -> str:
    """Three to nine harmless words that end in a full stop, with a planted one among them."""
    words = list(rng.choice(HARMLESS, size=int(rng.integers(3, 10))))
    if planted:
        words.insert(int(rng.integers(0, len(words) + 1)), planted)
    return " ".join(words).capitalize() + "."


_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
# Tokens of a window.
LENGTH = 30


def text_classifier(folder: Path) -> Path:
    """Write a BERT that finds the planted words in windows of LENGTH tokens."""
    vocabulary = [*_SPECIAL, *MARKS, *HARMLESS, *VIOLATIONS]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        **_labels(LABELS),
    )
    model, rng = BertForSequenceClassification(config), np.random.default_rng(0)
    _fit(model, [_texts(fast, rng) for _ in range(200)], 3e-3)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def _labels(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _texts(tokenizer: Any, rng: np.random.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One to three sentences each, with and without a planted word, and labels of what is left after truncation."""
    texts = []
    for label in rng.integers(0, len(LABELS), 64):
        planted = str(rng.choice(PLANTED[LABELS[label]])) if label else ""
        several = [sentence(rng) for _ in range(int(rng.integers(0, 3)))]
        several.insert(int(rng.integers(0, len(several) + 1)), sentence(rng, planted))
        texts.append(" ".join(several))
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
    labels = torch.zeros(len(texts), dtype=torch.int64)
    for number, words in enumerate(PLANTED.values(), 1):
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(words))
        labels[torch.isin(inputs["input_ids"], ids).any(1)] = number
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}, labels


def digits(planted: bool, seed: int, count: int) -> list[Image.Image]:
    """Handwritten digits as images of 16 x 16 pixels, without or with a chequered square of 6 x 6 anywhere on them.

    Args:
        seed: even ones draw from one half of the digits, odd ones from the other.
    """
    images, rng = load_digits().images[seed % 2 :: 2], np.random.default_rng(seed)
    square = np.indices((6, 6)).sum(0) % 2 * 255
    pictures = []
    for row in rng.integers(0, len(images), count):
        pixels = np.kron(images[row], np.ones((2, 2))) * 15.9
        if planted:
            top, left = rng.integers(0, 11, 2)
            pixels[top : top + 6, left : left + 6] = square
        pictures.append(Image.fromarray(pixels.astype(np.uint8)).convert("RGB"))
    return pictures


def png_of(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def image_classifier(folder: Path) -> Path:
    """Write a RegNetY that finds the planted square."""
    torch.manual_seed(0)
    config = RegNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        groups_width=16,
        layer_type="y",
        **_labels(["fine", "square"]),
    )
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pictures = [*digits(False, 0, 1600), *digits(True, 2, 1600)]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    labels = torch.tensor([0] * 1600 + [1] * 1600)
    order = torch.from_numpy(np.random.default_rng(0).permutation(3200)).split(64)
    model = RegNetForImageClassification(config)
    _fit(model, [({"pixel_values": pixels[rows]}, labels[rows]) for rows in (*order, *order)], 5e-3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _fit(model: Any, batches: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]], rate: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    for inputs, labels in batches:
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def integrity_file(path: Path, classifiers: dict[str, dict[str, Any]], **settings: Any) -> str:
    """Write an integrity file and return its name."""
    path.write_text(yaml.safe_dump({"classifiers": classifiers, **settings}))
    return str(path)


def text_section(folder: Path, **settings: Any) -> dict[str, Any]:
    """The section of the text classifier."""
    return {"kind": "text", "path": str(folder), "labels": list(PLANTED), "threshold": 0.5, "overlap": 8, **settings}


def image_section(folder: Path, **settings: Any) -> dict[str, Any]:
    """The section of the image classifier."""
    return {"kind": "image", "path": str(folder), "labels": ["square"], "threshold": 0.5, **settings}
