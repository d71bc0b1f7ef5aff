"""Literal text encoding: control tokens come only from the document layout, never from the text itself.

A document is a sequence of pieces, each a text or the id of a control token. A control token's name inside a text is
not recognized. Otherwise the ids are exactly those of the tokenizer for the document as one string, in which a text's
ids may depend on whether a token precedes it (sentencepiece's prefix) and on the text that it continues.
"""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Union

from megatron_anymal.data.records import DataError

# Delimiters around a control token's name that mark it as the token. Unicode noncharacters do not occur in text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
# The delimiters, and halves of surrogate pairs, which JSON can represent but UTF-8 cannot.
_UNUSABLE = re.compile("[\ufdd0\ufdd1\ud800-\udfff]")

Piece = Union[str, int]


class TextEncoder(Protocol):
    """Encodes single texts, and documents of texts and control tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of a single text."""

    def lay_out(self, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """Ids of a document. Adjacent texts without a control token between them are encoded as one text.

        Returns:
            For each token, its id and the number of its piece; for a token that spans several pieces, the last one.
        """


def build_encoder(hf: Any, control: Mapping[str, int]) -> TextEncoder:
    """Build the encoder for a transformers tokenizer. A fast tokenizer `hf` is copied: it is neither used nor changed.

    Args:
        control: ids of the control tokens, by name; text never produces them.
    """
    backend = getattr(hf, "backend_tokenizer", None)
    return _PythonEncoder(hf) if backend is None else _FastEncoder(backend, control)


class _FastEncoder:
    """A copy of the Rust tokenizer with control tokens renamed to names that cannot occur in text."""

    def __init__(self, backend: Any, control: Mapping[str, int]):
        self._any = min(control.values())
        body = json.loads(backend.to_str())
        # The unknown token is special as well, although text produces it.
        special = {entry["content"] for entry in body["added_tokens"] if entry["special"]}
        marked = {token: f"{_OPEN}{token}{_CLOSE}" for token in special | control.keys()}
        self._names = {number: marked[token] for token, number in control.items()}
        # Documents are never truncated or padded.
        body["truncation"] = body["padding"] = None
        # The post-processor adds tokens and shifts offsets.
        body["post_processor"] = None
        for entry in body["added_tokens"]:
            entry["content"] = marked.get(entry["content"], entry["content"])
        _rename(body["model"], marked)
        self._backend = type(backend).from_str(json.dumps(body))

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(_checked(text), add_special_tokens=False).ids)

    def lay_out(self, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        # A placeholder that is not a control token of the tokenizer is replaced by one, which separates texts alike.
        marks = [(piece if piece in self._names else self._any) for piece in pieces if isinstance(piece, int)]
        names = (self._names[mark] for mark in marks)
        texts = [next(names) if isinstance(piece, int) else _checked(piece) for piece in pieces]
        starts = [0]
        for text in texts[:-1]:
            starts.append(starts[-1] + len(text))
        encoding = self._backend.encode("".join(texts), add_special_tokens=False)
        numbers = (number for number, piece in enumerate(pieces) if isinstance(piece, int))
        expected = zip(marks, numbers)
        tokens = []
        for token, (begin, end) in zip(encoding.ids, encoding.offsets):
            if token in self._names:
                # The token may absorb surrounding blanks, so its offsets do not identify its piece.
                mark, number = next(expected, (None, 0))
                if mark != token:
                    raise DataError("the tokenizer changes the control tokens of a document.")
                tokens.append((int(pieces[number]), number))
            else:
                tokens.append((token, bisect_right(starts, max(begin, end - 1)) - 1))
        if next(expected, None) is not None:
            raise DataError("the tokenizer loses control tokens of a document.")
        return tokens


class _PythonEncoder:
    """A Python tokenizer: splits the document at its control tokens and encodes each stretch of text separately."""

    def __init__(self, hf: Any):
        # A copy, because the flag is state of the tokenizer and several threads may be encoding with it.
        self._hf = copy.deepcopy(hf)
        self._hf.split_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return list(self._hf.encode(_checked(text), add_special_tokens=False))

    def lay_out(self, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        tokens: list[tuple[int, int]] = []
        stretch: list[int] = []
        for number, piece in enumerate([*pieces, 0]):
            if isinstance(piece, str):
                stretch.append(number)
                continue
            tokens += self._stretch(pieces, stretch)
            stretch = []
            if number < len(pieces):
                tokens.append((piece, number))
        return tokens

    def _stretch(self, pieces: Sequence[Piece], numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Tokens of adjacent texts. Without offsets, a text ends at the first id that changes with its continuation."""
        texts = [str(pieces[number]) for number in numbers]
        whole = self.encode("".join(texts))
        ends = []
        for count in range(1, len(texts)):
            begun = self.encode("".join(texts[:count]))
            ends.append(next((n for n, (a, b) in enumerate(zip(begun, whole)) if a != b), min(len(begun), len(whole))))
        return [(token, numbers[bisect_right(ends, position)]) for position, token in enumerate(whole)]


def _checked(text: str) -> str:
    if match := _UNUSABLE.search(text):
        raise DataError(f"a text contains U+{ord(match[0]):04X}, which is not a character. Remove it.")
    return text


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens in a model's vocabulary, so that text cannot produce them."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    elif vocabulary:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not names.keys() & _of_merge(pair)]
    if model.get("dropout"):
        # BPE dropout is a training-time augmentation: the same text would get different ids each time.
        model["dropout"] = None


def _of_merge(pair: Any) -> set[str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return {left, right, left + right}
