"""From a sample's parts to token ids with media placeholders."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_anymal.data.chat_format import BEGIN, CHAT_TOKENS, END_HEADER, START_HEADER
from megatron_anymal.data.literal_text import Piece, TextEncoder, build_encoder
from megatron_anymal.data.records import DataError, MediaPart, Part, TextPart


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

    A document is the begin token, its parts in order, the end token. Text is literal: what is written in it, a control
    token's name too, is text. Text parts are tokenized one by one, so that the border between a question and its answer
    never falls inside a token. A media item becomes placeholder ids. A conversation's parts hold the chat format's
    tokens (data/chat_format.py); they are tokenized as one string, as transformers does, and no end token follows them.
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
        """A hash of all that decides how text becomes ids.

        Settings that encoding a batch leaves behind (truncation, padding) do not count: no document is cut or padded.
        """
        digest = hashlib.sha256()
        for token, number in sorted(self.hf.get_vocab().items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is not None:
            if backend.truncation is not None or backend.padding is not None:
                backend = copy.deepcopy(backend)
                backend.no_truncation()
                backend.no_padding()
            digest.update(backend.to_str().encode())
        digest.update(f"{self.begin} {self.end}".encode())
        return digest.hexdigest()

    def placeholder(self, token: str, where: str) -> int:
        """The id of a reserved token.

        Raises:
            DataError: the vocabulary has no such token, or it has another meaning, or it is an ordinary word; `where`
                is the key that asks for it.
        """
        number = self.hf.get_vocab().get(token)
        if number is None:
            raise DataError(f"{where}={token!r} is not in the tokenizer's vocabulary. Name one of its reserved tokens.")
        if number in (self.begin, self.end) or token in CHAT_TOKENS:
            raise DataError(
                f"{where}={token!r} begins or ends documents or turns. Name one of the tokenizer's reserved tokens."
            )
        if number in self.encode(token):
            raise DataError(
                f"{where}={token!r} is a word that texts can hold, not a special token. Name one of the tokenizer's "
                "reserved tokens."
            )
        return number

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added around it; control tokens written in it are text like any other.

        Raises:
            DataError: the tokenizer makes a control token of it all the same.
        """
        ids = self._encoder.encode(text)
        self._refuse_control(ids)
        return ids

    @cached_property
    def control(self) -> dict[str, int]:
        """The tokens that no text makes: special ones, and those that begin or end documents and turns."""
        found = {self.hf.bos_token: self.begin, self.hf.eos_token: self.end}
        for number, token in self.hf.added_tokens_decoder.items():
            if token.content in CHAT_TOKENS or (token.special and number != self.hf.unk_token_id):
                found[token.content] = number
        return found

    @cached_property
    def _encoder(self) -> TextEncoder:
        return build_encoder(self.hf, self.control)

    @cached_property
    def _written_control(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")")

    def _refuse_control(self, ids: Sequence[int]) -> None:
        # A tokenizer in Python whose vocabulary lists them as ordinary words could still let them through.
        if found := set(self.control.values()).intersection(ids):
            token = self.hf.convert_ids_to_tokens(min(found))
            raise DataError(f"the tokenizer makes its control token {token!r} of a text. Remove it from the text.")

    @cached_property
    def chat_tokens(self) -> frozenset[int]:
        """Ids of the chat format's tokens.

        Raises:
            DataError: naming the one that the tokenizer lacks, or does not keep in one piece.
        """
        folder = self.hf.name_or_path
        for token in CHAT_TOKENS:
            if token not in self.control:
                raise DataError(
                    f"data.tokenizer: {folder!r} has no special token {token!r}, which conversations need. Name a "
                    "tokenizer with Llama 3's special tokens, or give samples as `parts`."
                )
        if self.control[BEGIN] != self.begin:
            raise DataError(
                f"data.tokenizer: conversations begin with {BEGIN!r}, but the bos_token of {folder!r} is "
                f"{self.hf.bos_token!r}. Name a tokenizer with Llama 3's special tokens."
            )
        numbers = [self.control[token] for token in CHAT_TOKENS]
        begin, start, end, turn = numbers
        try:
            self._encoder.lay_out([begin, start, "user", end, "\n\n", "a", turn])
        except DataError as error:
            raise DataError(
                f"data.tokenizer: {folder!r} does not keep the chat format's tokens whole: {error} Add them without "
                "`single_word` and `normalized`, or give samples as `parts`."
            ) from None
        return frozenset(numbers)

    @cached_property
    def joins_headers(self) -> bool:
        """Whether line breaks that end a turn's header join what follows them (Llama 3's tokenizer keeps them apart).

        A model then sees other ids before the answers that it learns from than before the one it is to give.
        """
        header = TextPart(f"{START_HEADER}assistant{END_HEADER}\n\n", control=True)
        asked = self.document([header], [], {}, closed=False).tokens
        answers = [
            self.document([header, TextPart(said)], [], {}, closed=False).tokens for said in ("A", "a", "1", "(")
        ]
        return any(tokens[: len(asked)] != asked for tokens in answers)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        # Never tidied up: versions of transformers differ in when they do, and it changes what was answered.
        return self.hf.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def count(self, parts: Sequence[Part], *, closed: bool = True) -> tuple[int, int]:
        """Tokens of a document that are not media, and those of them that are targets; `closed` as of `document`."""
        media = [part for part in parts if isinstance(part, MediaPart)]
        # They part the texts around them, and are nothing themselves.
        bare = self.document(parts, [0] * len(media), {part.modality: -1 for part in media}, closed=closed)
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
            DataError: the tokenizer makes a media item's token of a text, or lacks a token of the chat format.
        """
        soft = iter(soft_tokens)
        counts = [next(soft) if isinstance(part, MediaPart) else 0 for part in parts]
        if any(isinstance(part, TextPart) and part.control for part in parts):
            laid_out = self._conversation(parts, placeholders)
        else:
            laid_out = self._plain(parts, placeholders)
        tokens, is_target, starts = [self.begin], [False], []
        for token, number in laid_out:
            part = parts[number]
            if isinstance(part, MediaPart):
                starts.append(len(tokens))
                tokens += [token] * counts[number]
                is_target += [False] * counts[number]
            else:
                tokens.append(token)
                is_target.append(part.loss)
        if closed:
            texts = [part for part in parts if isinstance(part, TextPart)]
            tokens.append(self.end)
            is_target.append(texts[-1].loss if texts else True)
        return Document(tokens, is_target, starts)

    def _plain(self, parts: Sequence[Part], placeholders: dict[str, int]) -> Iterator[tuple[int, int]]:
        """Tokens, each with the number of its part; texts one by one, a media item once."""
        for number, part in enumerate(parts):
            if isinstance(part, MediaPart):
                yield placeholders[part.modality], number
                continue
            ids = self.encode(part.text)
            self._refuse_placeholders(ids, placeholders)
            yield from ((token, number) for token in ids)

    def _conversation(self, parts: Sequence[Part], placeholders: dict[str, int]) -> Iterator[tuple[int, int]]:
        """The same of a text with control tokens, as one string after the begin token."""
        _ = self.chat_tokens
        pieces: list[Piece] = [self.begin]
        part_of = [-1]
        for number, part in enumerate(parts):
            if isinstance(part, MediaPart):
                added: list[Piece] = [placeholders[part.modality]]
            elif part.control:
                texts = self._written_control.split(part.text)
                added = [self.control.get(text, text) for text in texts if text]
            else:
                added = [part.text]
            pieces += added
            part_of += [number] * len(added)
        laid_out = self._encoder.lay_out(pieces)
        texts_only = [token for token, piece in laid_out if isinstance(pieces[piece], str)]
        self._refuse_control(texts_only)
        self._refuse_placeholders(texts_only, placeholders)
        yield from ((token, part_of[piece]) for token, piece in laid_out[1:])

    def _refuse_placeholders(self, ids: Sequence[int], placeholders: dict[str, int]) -> None:
        if found := set(placeholders.values()).intersection(ids):
            token = self.hf.convert_ids_to_tokens(min(found))
            raise DataError(f"a text holds {token!r}, which stands for media. Remove it.")
