"""Encoding text as text, whatever it spells: control tokens come only from the layout around it.

A document is laid out as pieces, each a text or the id of a control token. A control token's name inside a text is
never recognized. Otherwise the ids are exactly those that the tokenizer gives the document as one string, in which a
text's ids may depend on whether a token stands before it (sentencepiece's prefix) and on the text that it continues.
"""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Union

from megatron_anymal.data.records import DataError

# Written around a control token's name to mean the token. Noncharacters: Unicode keeps them out of exchanged text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
# These, and halves of surrogate pairs, which JSON can hold and no encoding of text can.
_UNUSABLE = re.compile("[\ufdd0\ufdd1\ud800-\udfff]")

Piece = Union[str, int]


class TextEncoder(Protocol):
    """Encodes texts, and texts between control tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone."""

    def lay_out(self, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """Ids of a document in which texts without a control token between them continue each other.

        Returns:
            Per token its id and the number of its piece; of a token that reaches into several, the last one.
        """


def build_encoder(hf: Any, control: Mapping[str, int]) -> TextEncoder:
    """The encoder for a tokenizer of transformers; `hf` itself is neither used to encode nor changed, if it is fast.

    Args:
        control: the tokens, by name, that no text can spell.
    """
    backend = getattr(hf, "backend_tokenizer", None)
    return _PythonEncoder(hf) if backend is None else _FastEncoder(backend, control)


class _FastEncoder:
    """A copy of the Rust tokenizer whose control tokens have names that no text holds."""

    def __init__(self, backend: Any, control: Mapping[str, int]):
        self._any = min(control.values())
        body = json.loads(backend.to_str())
        # The token for what is unknown is special too, but text makes it.
        special = {entry["content"] for entry in body["added_tokens"] if entry["special"]}
        marked = {token: f"{_OPEN}{token}{_CLOSE}" for token in special | control.keys()}
        self._names = {number: marked[token] for token, number in control.items()}
        # Settings of batches: a document is never cut or padded.
        body["truncation"] = body["padding"] = None
        # It adds tokens of its own, and moves offsets.
        body["post_processor"] = None
        for entry in body["added_tokens"]:
            entry["content"] = marked.get(entry["content"], entry["content"])
        _rename(body["model"], marked)
        self._backend = type(backend).from_str(json.dumps(body))

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(_checked(text), add_special_tokens=False).ids)

    def lay_out(self, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        # Any control token parts texts as a placeholder does that is none of the tokenizer's.
        marks = [(piece if piece in self._names else self._any) for piece in pieces if isinstance(piece, int)]
        names = (self._names[mark] for mark in marks)
        texts = [next(names) if isinstance(piece, int) else _checked(piece) for piece in pieces]
        starts = [0]
        for text in texts[:-1]:
            starts.append(starts[-1] + len(text))
        encoding = self._backend.encode("".join(texts), add_special_tokens=False)
        places = (number for number, piece in enumerate(pieces) if isinstance(piece, int))
        expected = zip(marks, places)
        tokens = []
        for token, (begin, end) in zip(encoding.ids, encoding.offsets):
            if token in self._names:
                # It may take blanks around it along, so its offsets do not say where it stands.
                mark, number = next(expected, (None, 0))
                if mark != token:
                    raise DataError("the tokenizer makes other control tokens of a document than were put into it.")
                tokens.append((int(pieces[number]), number))
            else:
                tokens.append((token, bisect_right(starts, max(begin, end - 1)) - 1))
        if next(expected, None) is not None:
            raise DataError("the tokenizer loses control tokens of a document.")
        return tokens


class _PythonEncoder:
    """A tokenizer in Python cuts a string at its control tokens first, and encodes each stretch by itself."""

    def __init__(self, hf: Any):
        # A copy: the switch is a state of the tokenizer, and several threads encode at the same time.
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
        """Tokens of neighbouring texts. There are no offsets: a text ends where its continuation changes the ids."""
        texts = [str(pieces[number]) for number in numbers]
        whole = self.encode("".join(texts))
        ends = []
        for count in range(1, len(texts)):
            begun = self.encode("".join(texts[:count]))
            ends.append(next((n for n, (a, b) in enumerate(zip(begun, whole)) if a != b), min(len(begun), len(whole))))
        return [(token, numbers[bisect_right(ends, place)]) for place, token in enumerate(whole)]


def _checked(text: str) -> str:
    if found := _UNUSABLE.search(text):
        raise DataError(f"a text holds U+{ord(found[0]):04X}, which is not a character of any text. Remove it.")
    return text


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens of a model's vocabulary, so that it cannot make them of text."""
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
        # Made for training a model of words: the same text would get other ids each time.
        model["dropout"] = None


def _of_merge(pair: Any) -> set[str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return {left, right, left + right}
