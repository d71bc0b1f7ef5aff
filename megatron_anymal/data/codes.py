"""Media as codes of the Llama's own vocabulary (MIO section 2.1): their files, and their token ids.

A file of codes is an array of integers in numpy's .npy format, [codes] for a single codebook or [codebooks, codes].
Its name ends in `codes.npy`. In a document it becomes

    <image> code code ... </image>

With several codebooks A, B, ... an item in an answer has the codes of all of them, by default one codebook after the
other (a1 a2 b1 b2), and an item in a prompt only those of the first `prompt_codebooks`: the first codebook of a speech
tokenizer carries the content and the others the timbre.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Optional

import numpy as np

from megatron_anymal.config import DiscreteConfig
from megatron_anymal.data.content_parts import CODES_ENDING
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.records import CodesPart, DataError
from megatron_anymal.modalities.base import MediaError

# Where an item stands: in a prompt, in an answer that is not learned (an earlier turn of a preference pair), in a
# learned answer, or in the rejected answer of a pair.
PROMPT, TOLD, ANSWER, REJECTED = ROLES = ("prompt", "told", "answer", "rejected")
# The attribute of an item that states the identity of the tokenizer that made its codes.
HASH_ATTRIBUTE = "tokenizer_hash"
_NAME = re.compile(r"[A-Za-z0-9_-]*")
_PREFIX = "codes"


@dataclass(frozen=True)
class CodesKind:
    """The kind of an item of codes in an index: all that decides its tokens besides the number of its codes."""

    # Name in model.discrete; empty if neither the sample nor the member's name states it.
    name: str
    # One of ROLES.
    role: str
    # Number of codebooks in the file.
    codebooks: int
    # Identity of the tokenizer that made the codes; empty if it is not stated.
    tokenizer: str = ""

    def __str__(self) -> str:
        return ":".join((_PREFIX, self.name, self.role, str(self.codebooks), self.tokenizer))

    @staticmethod
    def parse(kind: str) -> Optional[CodesKind]:
        """Read a kind of an index; None if it is not one of codes."""
        if not kind.startswith(f"{_PREFIX}:"):
            return None
        _, name, role, codebooks, tokenizer = kind.split(":")
        return CodesKind(name, role, int(codebooks), tokenizer)

    @staticmethod
    def of(part: CodesPart, name: str, codebooks: int, tokenizer: object, *, rejected: bool) -> CodesKind:
        """The kind of an item.

        Args:
            part: its part of the sample.
            name: in model.discrete.
            codebooks: of its file.
            tokenizer: the value of HASH_ATTRIBUTE.
            rejected: whether it belongs to the rejected answer of a preference pair.

        Raises:
            MediaError: the name or the tokenizer's hash has characters that it cannot have.
        """
        if not _NAME.fullmatch(name):
            raise MediaError(f"has the modality {name!r}; names in model.discrete have letters, digits, - and _ only")
        if not isinstance(tokenizer, str) or not _NAME.fullmatch(tokenizer):
            raise MediaError(f"has the {HASH_ATTRIBUTE} {tokenizer!r}; it has letters, digits, - and _ only")
        role = (TOLD if part.generated else PROMPT) if not part.loss else (REJECTED if rejected else ANSWER)
        return CodesKind(name, role, codebooks, tokenizer)


def name_in_member(member: str) -> str:
    """Name in model.discrete that a member of a shard states: `0.speech.codes.npy` is speech, `codes.npy` none."""
    return re.sub(r"^\d+\.", "", member.lower()).removesuffix(CODES_ENDING).rstrip(".")


def read_codes(data: bytes) -> np.ndarray:
    """Read a file of codes, [codebooks, codes] int64.

    Raises:
        MediaError: it is not an .npy file of non-negative integers with one or two axes, or it is empty.
    """
    try:
        codes = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise MediaError(f"is not an .npy file of codes ({error})") from None
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu":
        raise MediaError(f"has values of type {getattr(codes, 'dtype', 'archive')}; codes are integers, such as int16")
    if codes.ndim not in (1, 2):
        raise MediaError(f"has the shape {codes.shape}; codes have the shape [codes] or [codebooks, codes]")
    if not codes.size:
        raise MediaError(f"has the shape {codes.shape}, without any codes")
    codes = codes.reshape(-1, codes.shape[-1])
    if codes.min() < 0 or codes.max() > np.iinfo(np.int64).max:
        raise MediaError(f"has the code {min(int(codes.min()), 0) or int(codes.max())}; codes count from 0")
    return codes.astype(np.int64)


@dataclass(frozen=True)
class PlannedCodes:
    """The lengths of items of one kind."""

    # Name in model.discrete.
    name: str
    # Codebooks whose codes become tokens.
    codebooks: int
    # Whether the first and the second document of a sample contain the items.
    documents: tuple[bool, bool]
    # Whether marks and codes are loss targets.
    loss: bool

    def tokens(self, codes: np.ndarray) -> np.ndarray:
        """[n] int64: marks and codes of items, given their numbers of codes per codebook, [n]."""
        return 2 + codes.astype(np.int64) * self.codebooks


NO_CODES: Mapping[str, PlannedCodes] = MappingProxyType({})


def plan_codes(kind: CodesKind, sections: Mapping[str, DiscreteConfig], where: str) -> PlannedCodes:
    """Find the section of `model.discrete` for items of a kind.

    Args:
        where: the folder that has them, for messages.

    Raises:
        DataError: there is no such section, or the items are of another tokenizer or number of codebooks.
    """
    name = kind.name or (next(iter(sections)) if len(sections) == 1 else "")
    if name not in sections:
        known = ", ".join(sections) or "none"
        if not kind.name and sections:
            raise DataError(
                f"{where} has codes without a name, but model.discrete has several sections ({known}). State one in "
                "each sample (`modality`) or member (KEY.NAME.codes.npy), or index with --modality codes.npy=NAME."
            )
        add = kind.name or "NAME"
        raise DataError(f"{where} has codes of {add!r}, but model.discrete has: {known}. Add model.discrete.{add}.")
    section = sections[name]
    if section.tokenizer_hash and kind.tokenizer != section.tokenizer_hash:
        made = f"of the tokenizer {kind.tokenizer!r}" if kind.tokenizer else "of an unknown tokenizer"
        raise DataError(
            f"{where} has codes of {name!r} {made}, but model.discrete.{name}.tokenizer_hash={section.tokenizer_hash}. "
            f"Encode the media with that tokenizer; if it made them, index with --attribute {name}.{HASH_ATTRIBUTE}="
            f"{section.tokenizer_hash}."
        )
    generated, have = kind.role != PROMPT, len(section.codebooks)
    used = have if generated else prompt_codebooks(section)
    if kind.codebooks < used or (have == 1 and kind.codebooks > 1):
        raise DataError(
            f"{where} has codes of {name!r} with {kind.codebooks} codebook(s), but model.discrete.{name}.codebooks has "
            f"{have}, of which {'an answer' if generated else 'a prompt'} needs {used}. Store that many, or change it."
        )
    documents = (kind.role != REJECTED, kind.role != ANSWER)
    return PlannedCodes(name, used, documents, kind.role in (ANSWER, REJECTED))


def plan_kinds(kinds: Iterable[str], sections: Mapping[str, DiscreteConfig], where: str) -> dict[str, PlannedCodes]:
    """`plan_codes` of those kinds of an index that are codes, by kind.

    Raises:
        DataError: as `plan_codes`.
    """
    parsed = {kind: CodesKind.parse(kind) for kind in sorted(kinds)}
    return {kind: plan_codes(codes, sections, where) for kind, codes in parsed.items() if codes}


def prompt_codebooks(section: DiscreteConfig) -> int:
    """Number of codebooks whose codes stand for an item in a prompt."""
    return min(section.prompt_codebooks or len(section.codebooks), len(section.codebooks))


class CodeLayout:
    """Token ids of items of codes."""

    def __init__(self, vocabulary: DiscreteVocabulary, sections: Mapping[str, DiscreteConfig]):
        """Nothing is read.

        Args:
            sections: `model.discrete`, from which the vocabulary was made.
        """
        self.vocabulary, self.sections = vocabulary, sections

    @staticmethod
    def of_export(discrete: Mapping[str, Any]) -> CodeLayout:
        """The layout of an export, from `discrete` of its configuration or processor; empty without sections."""
        sections = {name: DiscreteConfig(**section) for name, section in discrete.get("sections", {}).items()}
        return CodeLayout(DiscreteVocabulary(discrete.get("base_size", 0), sections), sections)

    def tokens(self, name: str, data: bytes, *, generated: bool) -> tuple[int, ...]:
        """Begin mark, codes and end mark of an item.

        Args:
            name: in model.discrete.
            data: content of its file.
            generated: it belongs to an answer, and has the codes of all codebooks.

        Raises:
            MediaError: it cannot be read, has another number of codes or codebooks than its section states, or a code
                outside its codebook.
        """
        section, codes = self.sections[name], read_codes(data)
        used = len(section.codebooks) if generated else prompt_codebooks(section)
        if len(codes) < used:
            raise MediaError(f"has {len(codes)} codebook(s); model.discrete.{name}.codebooks needs {used}")
        # The last levels of a residual quantizer may be left out (MIO keeps 4 of 8).
        codes = codes[: len(section.codebooks)]
        each = section.codes_per_item // len(section.codebooks)
        if each and codes.shape[1] != each:
            raise MediaError(
                f"has {codes.shape[1]} codes per codebook, but model.discrete.{name}.codes_per_item="
                f"{section.codes_per_item} means {each}; encode it again, or set codes_per_item=0 for any number"
            )
        sizes = np.array(section.codebooks[: len(codes)])[:, None]
        if (codes >= sizes).any():
            book, at = np.argwhere(codes >= sizes)[0].tolist()
            raise MediaError(
                f"has the code {codes[book, at]} at position {at}, outside codebook {book} of {name!r}, which has the "
                f"codes 0 to {section.codebooks[book] - 1}; encode it with the tokenizer of model.discrete.{name}"
            )
        first = np.array([self.vocabulary.codebook(name, book).start for book in range(used)])
        ids = codes[:used] + first[:, None]
        ordered = ids if section.interleaving == "sequential" else ids.T
        return (self.vocabulary.begin(name), *ordered.ravel().tolist(), self.vocabulary.end(name))
