"""Converts a sample's parts to token ids with media placeholders."""

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
from megatron_anymal.data.records import CodesPart, DataError, DocumentPart, MediaPart, TextPart, TokensPart

# Stands for the ids of a part while the texts around it are tokenized.
_HELD = -1


@dataclass(frozen=True)
class Document:
    """A sample as token ids."""

    # Token ids, with placeholders at the positions of soft tokens.
    tokens: list[int]
    # Whether the token is a loss target.
    is_target: list[bool]
    # Position of each media item's first placeholder, in the order of the items.
    media_starts: list[int]


class Tokenizer:
    """A HuggingFace tokenizer from a local folder, together with the document layout.

    A document is the begin token, its parts in order, and the end token. Text is literal: a control token's name in a
    text is tokenized as plain text. Text parts are tokenized separately, so that no token spans the boundary between a
    question and its answer. A media item becomes placeholder ids. The parts of a conversation include the chat format's
    control tokens (data/chat_format.py); they are tokenized as one string, as transformers does, without an end token.
    """

    def __init__(self, folder: str):
        """Load a tokenizer.

        Raises:
            DataError: the folder is missing, does not contain a tokenizer, or the tokenizer lacks a begin or end token.
        """
        self._folder = folder
        _ = self.hf
        self._find_ends()

    @cached_property
    def hf(self) -> Any:
        """transformers' tokenizer.

        Raises:
            DataError: as the constructor.
        """
        folder = self._folder
        if not Path(folder).is_dir():
            raise DataError(f"data.tokenizer: there is no folder {folder!r}. Correct the path.")
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            if "custom code" in str(error):
                raise DataError(
                    f"data.tokenizer: {folder!r} needs Python code of its own (its auto_map), which is never run. Use "
                    "a tokenizer with a class that is part of transformers."
                ) from None
            raise DataError(
                f"data.tokenizer: {folder!r} does not contain a tokenizer that transformers can load ({error})."
            ) from None

    @classmethod
    def of(cls, hf: Any) -> Tokenizer:
        """Wrap a tokenizer that transformers has already loaded.

        Raises:
            DataError: the tokenizer lacks a begin or end token.
        """
        tokenizer = cls.__new__(cls)
        tokenizer._folder, tokenizer.hf = "", hf
        tokenizer._find_ends()
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy in another process: it encodes texts without transformers, whose import takes seconds,
        and loads transformers' tokenizer from the folder if that is needed after all."""
        state = {**vars(self), "control": self.control, "_encoder": self._encoder}
        return {name: value for name, value in state.items() if name != "hf" or not self._folder}

    def _find_ends(self) -> None:
        self.name: str = self.hf.name_or_path
        if self.hf.bos_token_id is None or self.hf.eos_token_id is None:
            raise DataError(f"data.tokenizer: the tokenizer in {self.name!r} lacks a bos_token or eos_token.")
        self.begin: int = self.hf.bos_token_id
        self.end: int = self.hf.eos_token_id

    def fingerprint(self) -> str:
        """Hash of everything that determines how text is converted to ids.

        Truncation and padding settings, which remain from encoding a batch, do not count: documents are never
        truncated or padded.
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
            DataError: the token is not in the vocabulary, has another meaning, or is an ordinary word. The message
                starts with `where`, the configuration key.
        """
        number = self.hf.get_vocab().get(token)
        if number is None:
            raise DataError(f"{where}={token!r} is not in the tokenizer's vocabulary. Use one of its reserved tokens.")
        if number in (self.begin, self.end) or token in CHAT_TOKENS:
            raise DataError(
                f"{where}={token!r} begins or ends documents or turns. Use one of the tokenizer's reserved tokens."
            )
        if number in self.encode(token):
            raise DataError(
                f"{where}={token!r} is a word that can occur in text, not a special token. Use one of the tokenizer's "
                "reserved tokens."
            )
        return number

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it; control tokens written in the text are plain text.

        Raises:
            DataError: the tokenizer produces a control token nevertheless.
        """
        ids = self._encoder.encode(text)
        self._refuse_control(ids)
        return ids

    @cached_property
    def control(self) -> dict[str, int]:
        """Tokens that text never produces: special tokens, and those that begin or end documents and turns."""
        ids = {self.hf.bos_token: self.begin, self.hf.eos_token: self.end}
        for number, token in self.hf.added_tokens_decoder.items():
            if token.content in CHAT_TOKENS or (token.special and number != self.hf.unk_token_id):
                ids[token.content] = number
        return ids

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.control.values())

    @cached_property
    def _encoder(self) -> TextEncoder:
        return build_encoder(self.hf, self.control)

    @cached_property
    def _written_control(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")")

    def _refuse_control(self, ids: Sequence[int]) -> None:
        # A Python tokenizer whose vocabulary lists control tokens as ordinary words could still produce them.
        if produced := self._control_ids.intersection(ids):
            token = self.hf.convert_ids_to_tokens(min(produced))
            raise DataError(f"the tokenizer produces its control token {token!r} from a text. Remove it from the text.")

    @cached_property
    def chat_tokens(self) -> frozenset[int]:
        """Ids of the chat format's tokens.

        Raises:
            DataError: naming the token that the tokenizer lacks, or does not keep as a single token.
        """
        for token in CHAT_TOKENS:
            if token not in self.control:
                raise DataError(
                    f"data.tokenizer: {self.name!r} has no special token {token!r}, which conversations need. Use a "
                    "tokenizer with Llama 3's special tokens, or provide samples as `parts`."
                )
        if self.control[BEGIN] != self.begin:
            raise DataError(
                f"data.tokenizer: conversations begin with {BEGIN!r}, but the bos_token of {self.name!r} is "
                f"{self.hf.bos_token!r}. Use a tokenizer with Llama 3's special tokens."
            )
        numbers = [self.control[token] for token in CHAT_TOKENS]
        begin, start, end, turn = numbers
        try:
            self._encoder.lay_out([begin, start, "user", end, "\n\n", "a", turn])
        except DataError as error:
            raise DataError(
                f"data.tokenizer: {self.name!r} does not keep the chat format's tokens whole: {error} Add them without "
                "`single_word` and `normalized`, or provide samples as `parts`."
            ) from None
        return frozenset(numbers)

    @cached_property
    def joins_headers(self) -> bool:
        """Whether the line breaks that end a turn's header merge with the following text (not in Llama 3's tokenizer).

        If so, the ids before an answer differ between training and generation.

        Raises:
            DataError: the tokenizer lacks a token of the chat format.
        """
        header = TextPart(f"{START_HEADER}assistant{END_HEADER}\n\n", control=True)
        prompt = self.document([header], [], {}, closed=False).tokens
        answers = [
            self.document([header, TextPart(text)], [], {}, closed=False).tokens for text in ("A", "a", "1", "(")
        ]
        return any(tokens[: len(prompt)] != prompt for tokens in answers)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        # Versions of transformers differ in when they clean up spaces by default, and it alters the answer.
        return self.hf.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def count(self, parts: Sequence[DocumentPart], *, closed: bool = True) -> tuple[int, int]:
        """Number of tokens of a document without media, and number of targets among them; `closed` as in `document`.

        Raises:
            DataError: as in `document`.
        """
        if not any(isinstance(part, TextPart) and part.control for part in parts):
            return self._count_plain(parts, closed)
        media = [part for part in parts if isinstance(part, MediaPart)]
        # Media items separate the texts around them but contribute no tokens here.
        bare = self.document(parts, [0] * len(media), {part.modality: -1 for part in media}, closed=closed)
        return len(bare.tokens), sum(bare.is_target)

    def _count_plain(self, parts: Sequence[DocumentPart], closed: bool) -> tuple[int, int]:
        """The lengths of the document that `_plain` lays out, without laying it out."""
        lengths = [(len(self.encode(part.text)), part.loss) for part in parts if isinstance(part, TextPart)]
        tokens = 1 + sum(length for length, _ in lengths) + closed
        return tokens, sum(length for length, loss in lengths if loss) + (closed and _learns_end(parts))

    def document(
        self,
        parts: Sequence[DocumentPart],
        soft_tokens: Sequence[int],
        placeholders: dict[str, int],
        *,
        closed: bool = True,
    ) -> Document:
        """Lay out a document.

        Args:
            parts: text and media parts; codes as `TokensPart`.
            soft_tokens: number of soft tokens of each media item, in order.
            placeholders: modality -> placeholder id.
            closed: append the end token; false for a conversation, and for a prompt whose answer is to be generated.

        Raises:
            DataError: the tokenizer produces a placeholder token from a text, or lacks a token of the chat format.
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
            elif isinstance(part, TokensPart):
                tokens += part.tokens
                is_target += [part.loss] * len(part.tokens)
            else:
                tokens.append(token)
                is_target.append(part.loss)
        if closed:
            tokens.append(self.end)
            is_target.append(_learns_end(parts))
        return Document(tokens, is_target, starts)

    def _plain(self, parts: Sequence[DocumentPart], placeholders: dict[str, int]) -> Iterator[tuple[int, int]]:
        """Tokens, each with the number of its part. Texts are tokenized separately; media and codes yield one token."""
        for number, part in enumerate(parts):
            if isinstance(part, MediaPart):
                yield placeholders[part.modality], number
                continue
            if isinstance(part, TokensPart):
                yield _HELD, number
                continue
            ids = self.encode(part.text)
            self._refuse_placeholders(ids, placeholders)
            yield from ((token, number) for token in ids)

    def _conversation(self, parts: Sequence[DocumentPart], placeholders: dict[str, int]) -> Iterator[tuple[int, int]]:
        """Like `_plain`, for parts with control tokens, tokenized as one string after the begin token."""
        _ = self.chat_tokens
        pieces: list[Piece] = [self.begin]
        part_of = [-1]
        for number, part in enumerate(parts):
            if isinstance(part, MediaPart):
                added: list[Piece] = [placeholders[part.modality]]
            elif isinstance(part, TokensPart):
                added = [_HELD]
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
        if produced := set(placeholders.values()).intersection(ids):
            token = self.hf.convert_ids_to_tokens(min(produced))
            raise DataError(f"a text contains {token!r}, which is reserved for media. Remove it.")


def _learns_end(parts: Sequence[DocumentPart]) -> bool:
    """Whether the end token is a target: if the last text is, or codes after it are."""
    losses = [
        part.loss
        for part in parts
        if isinstance(part, TextPart) or (isinstance(part, (CodesPart, TokensPart)) and part.loss)
    ]
    return losses[-1] if losses else True
