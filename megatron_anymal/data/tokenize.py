"""From a sample's parts to token ids with media placeholders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    border between a question and its answer never falls inside a token. A media item becomes placeholder ids.
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
            self.hf = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.tokenizer: {folder!r} holds no tokenizer that transformers can load ({error})."
            ) from None
        if self.hf.bos_token_id is None or self.hf.eos_token_id is None:
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
        if number in (self.begin, self.end):
            raise DataError(f"{where}={token!r} begins or ends documents. Name one of the tokenizer's reserved tokens.")
        return number

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added around it."""
        return self.hf.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.hf.decode(list(tokens), skip_special_tokens=True)

    def count(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Tokens of a sample that are not media, and those of them that are targets."""
        bare = self.document([part for part in parts if isinstance(part, TextPart)], [], {})
        return len(bare.tokens), sum(bare.is_target)

    def document(
        self,
        parts: Sequence[Part],
        soft_tokens: Sequence[int],
        placeholders: dict[str, int],
        *,
        closed: bool = True,
    ) -> Document:
        """Lay a sample out.

        Args:
            parts: its text and media.
            soft_tokens: number of soft tokens of each media item, in order.
            placeholders: modality -> placeholder id.
            closed: end with the end token; false leaves the answer open for generation.

        Raises:
            DataError: a text holds a token that stands for media.
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
            ids = self.encode(part.text)
            if reserved.intersection(ids):
                raise DataError(
                    f"a text holds {self.hf.convert_ids_to_tokens(min(reserved.intersection(ids)))!r}, "
                    "which stands for media. Remove it."
                )
            tokens += ids
            is_target += [part.loss] * len(ids)
            last_has_loss = part.loss
        if closed:
            tokens.append(self.end)
            is_target.append(last_has_loss)
        return Document(tokens, is_target, starts)
