"""From a sample's parts to token ids with media placeholders."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_anymal.data.messages import BEGIN, CHAT_TOKENS
from megatron_anymal.data.types import DataError, MediaPart, Part, TextPart


@dataclass(frozen=True)
class Document:
    """A sample as token ids."""

    tokens: list[int]
    # Whether the token, as a label, enters the loss.
    is_target: list[bool]
    # Where each media item's placeholders begin, in the order of the items.
    media_starts: list[int]


class Tokenizer:
    """A HuggingFace tokenizer from a local folder, and the layout of a document around it.

    A document is the begin token, its parts in order, the end token. Text parts are tokenized one by one, so that the
    border between a question and its answer never falls inside a token. A media item becomes placeholder ids. A
    conversation's parts hold the chat format's tokens themselves (data/messages.py), and no end token follows them.
    """

    def __init__(self, folder: str):
        """Load it.

        Raises:
            DataError: the folder is missing, holds no tokenizer, or one without begin and end tokens.
        """
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise DataError(f"data.tokenizer: there is no folder {folder!r}.")
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            if "custom code" in str(error):
                raise DataError(
                    f"data.tokenizer: {folder!r} needs Python code of its own (its auto_map), which is never run. Name "
                    "a tokenizer of transformers' own classes."
                ) from None
            raise DataError(
                f"data.tokenizer: {folder!r} holds no tokenizer that transformers can load ({error})."
            ) from None
        self._find_ends()

    @classmethod
    def of(cls, hf: Any) -> Tokenizer:
        """One that transformers has loaded already.

        Raises:
            DataError: it has no begin and end tokens.
        """
        made = cls.__new__(cls)
        made.hf = hf
        made._find_ends()
        return made

    def _find_ends(self) -> None:
        if self.hf.bos_token_id is None or self.hf.eos_token_id is None:
            folder = self.hf.name_or_path
            raise DataError(f"data.tokenizer: the tokenizer in {folder!r} names no bos_token and eos_token.")
        self.begin: int = self.hf.bos_token_id
        self.end: int = self.hf.eos_token_id

    def fingerprint(self) -> str:
        """A hash of all that decides how text becomes ids."""
        digest = hashlib.sha256()
        for token, number in sorted(self.hf.get_vocab().items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is not None:
            digest.update(backend.to_str().encode())
        digest.update(f"{self.begin} {self.end}".encode())
        return digest.hexdigest()

    def placeholder(self, token: str, where: str) -> int:
        """The id of a reserved token.

        Raises:
            DataError: the vocabulary has no such token, or it has another meaning; `where` is the key that asks for it.
        """
        number = self.hf.get_vocab().get(token)
        if number is None:
            raise DataError(f"{where}={token!r} is not in the tokenizer's vocabulary. Name one of its reserved tokens.")
        if number in (self.begin, self.end) or token in CHAT_TOKENS:
            raise DataError(
                f"{where}={token!r} begins or ends documents or turns. Name one of the tokenizer's reserved tokens."
            )
        return number

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added around it; special tokens written in it are those tokens."""
        return self.hf.encode(text, add_special_tokens=False)

    def encode_literal(self, text: str) -> list[int]:
        """Ids of a text, nothing added around it; special tokens written in it are text like any other."""
        return self._literal.encode(text, add_special_tokens=False)

    @cached_property
    def _literal(self) -> Any:
        # A tokenizer of its own: the switch is a state of the tokenizer, and several threads encode at the same time.
        literal = copy.deepcopy(self.hf)
        literal.split_special_tokens = True
        return literal

    @cached_property
    def chat_tokens(self) -> frozenset[int]:
        """Ids of the chat format's tokens.

        Raises:
            DataError: naming the one that the tokenizer lacks, or does not keep in one piece.
        """
        folder, vocabulary = self.hf.name_or_path, self.hf.get_vocab()
        for token in CHAT_TOKENS:
            if token not in vocabulary or self.encode(token) != [vocabulary[token]]:
                raise DataError(
                    f"data.tokenizer: {folder!r} has no special token {token!r}, which conversations need. Name a "
                    "tokenizer with Llama 3's special tokens, or give samples as `parts`."
                )
        if vocabulary[BEGIN] != self.begin:
            raise DataError(
                f"data.tokenizer: conversations begin with {BEGIN!r}, but the bos_token of {folder!r} is "
                f"{self.hf.bos_token!r}. Name a tokenizer with Llama 3's special tokens."
            )
        return frozenset(vocabulary[token] for token in CHAT_TOKENS)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        # Never tidied up: versions of transformers differ in when they do, and it changes what was answered.
        return self.hf.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def count(self, parts: Sequence[Part], *, closed: bool = True) -> tuple[int, int]:
        """Tokens of a document that are not media, and those of them that are targets; `closed` as of `document`."""
        bare = self.document([part for part in parts if isinstance(part, TextPart)], [], {}, closed=closed)
        return len(bare.tokens), sum(bare.is_target)

    def document(
        self,
        parts: Sequence[Part],
        soft_tokens: Sequence[int],
        placeholders: dict[str, int],
        *,
        closed: bool = True,
    ) -> Document:
        """Lay a document out.

        Args:
            parts: its text and media.
            soft_tokens: number of soft tokens of each media item, in order.
            placeholders: modality -> placeholder id.
            closed: end with the end token; false for a conversation, and where an answer is to be generated.

        Raises:
            DataError: a text holds a token that stands for media; the tokenizer lacks a token of the chat format.
        """
        tokens, is_target, starts = [self.begin], [False], []
        reserved = set(placeholders.values())
        remaining = iter(soft_tokens)
        last_has_loss = True
        for part in parts:
            if isinstance(part, MediaPart):
                starts.append(len(tokens))
                count = next(remaining)
                tokens += [placeholders[part.modality]] * count
                is_target += [False] * count
                continue
            ids = self._text(part, reserved)
            tokens += ids
            is_target += [part.loss] * len(ids)
            last_has_loss = part.loss
        if closed:
            tokens.append(self.end)
            is_target.append(last_has_loss)
        return Document(tokens, is_target, starts)

    def _text(self, part: TextPart, placeholders: set[int]) -> list[int]:
        ids = self.encode_literal(part.text) if part.literal else self.encode(part.text)
        # A vocabulary that lists them as ordinary words could still let them through.
        reserved = (placeholders | self.chat_tokens | {self.end}) if part.literal else placeholders
        if reserved.intersection(ids):
            number = min(reserved.intersection(ids))
            stands = "stands for media" if number in placeholders else "begins or ends a turn"
            raise DataError(f"a text holds {self.hf.convert_ids_to_tokens(number)!r}, which {stands}. Remove it.")
        return ids
