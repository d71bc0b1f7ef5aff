"""Checks of a prepared folder: reads each sample, verifies checksums, counts its tokens and decodes its media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from megatron_anymal.config import EncoderConfig, LimitsConfig, ModalityConfig
from megatron_anymal.data.codes import CodeLayout, CodesKind, plan_codes, read_codes
from megatron_anymal.data.configured_modality import LoadedModality
from megatron_anymal.data.content_parts import with_tokens
from megatron_anymal.data.records import CodesPart, DataError, Sample
from megatron_anymal.data.shard_index import MediaBytes, ShardIndex
from megatron_anymal.data.tokenizer import Document, Tokenizer
from megatron_anymal.modalities import MODALITIES, MediaError, Modality, build_modality
from megatron_anymal.telemetry import Progress

# Names of the two numbers of `Modality.probe`.
SIZE_NAMES = {"image": ("width", "height"), "video": ("seconds", "frames/s")}
TIMED = ("seconds", "Hz")
_OF_CODES = ("codes", "highest code")
# Stand-in encoders for test decoding without a run configuration.
_STAND_INS = {
    "image": EncoderConfig(type="clip", config={"image_size": 224}),
    "video": EncoderConfig(type="clip", config={"image_size": 224}),
    "audio": EncoderConfig(type="identity"),
    "imu": EncoderConfig(type="imu2clip"),
}
# Samples submitted to the threads at a time.
_CHUNK = 1024


def size_names(kind: str) -> tuple[str, str]:
    """Names of the two numbers that an index has of an item of a kind."""
    return _OF_CODES if CodesKind.parse(kind) else SIZE_NAMES.get(kind, TIMED)


def kind_name(kind: str) -> str:
    """How a kind of an index is shown: codes by the name of their section."""
    codes = CodesKind.parse(kind)
    if codes is None:
        return kind
    books = f" in {codes.codebooks} codebooks" if codes.codebooks > 1 else ""
    return f"{codes.name or 'unnamed'} codes ({codes.role}{books})"


@dataclass(frozen=True)
class Reading:
    """How samples are read: with a run's modalities (by kind), or with stand-ins that only test the files."""

    # Tokenizer for the samples' texts.
    tokenizer: Tokenizer
    # Kind -> modality.
    modalities: Mapping[str, Modality]
    # Kind -> placeholder and soft tokens; empty without a configuration.
    loaded: Mapping[str, LoadedModality] = field(default_factory=dict)
    # Token ids of codes; None without a configuration.
    codes: Optional[CodeLayout] = None

    @staticmethod
    def without_configuration(tokenizer: Tokenizer, index: ShardIndex) -> Reading:
        """Use stand-ins for the kinds that have one; media of other kinds are only probed."""
        stand_ins = {
            kind: build_modality(kind, ModalityConfig(encoder=_STAND_INS[kind]), index.limits)
            for kind in index.kinds_used() & _STAND_INS.keys()
        }
        return Reading(tokenizer, stand_ins)


@dataclass(frozen=True)
class ReadSample:
    """A sample as the model sees it."""

    # The parsed sample.
    sample: Sample
    # Content of its media items, in order.
    media: list[MediaBytes]
    # Number of pieces of each media item; 0 for codes, and without a configuration.
    pieces: list[int]
    # One for each of the sample's documents.
    documents: list[Document]


def read_sample(index: ShardIndex, number: int, reading: Reading) -> ReadSample:
    """Read one sample, decode its media and lay out its tokens.

    Without a configuration a document has no soft tokens, but its `media_starts` still give the positions of the media.

    Raises:
        DataError, MediaError: the sample is damaged, cannot be decoded, or does not match its index.
    """
    sample, tokenizer = index.sample(number), reading.tokenizer
    indexed = zip(*(counts[0] for counts in index.lengths(np.array([number]))))
    for parts, (tokens, targets) in zip(sample.documents, indexed):
        counted = tokenizer.count(parts, closed=sample.closed)
        if counted != (tokens, targets):
            raise DataError(
                f"it has {counted[0]} text tokens, {counted[1]} of them targets, but the index states {tokens} and "
                f"{targets}. Rebuild the index with `anymal prepare --rebuild --index-only`."
            )
    rows = index.media_rows(number)
    media = index.read_media(number, sample.media, range(len(rows)))
    pieces, codes = [], []
    for item, media_row in zip(media, rows):
        try:
            is_codes = isinstance(item.part, CodesPart)
            codes.append(_tokens_of_codes(item, reading) if is_codes else None)
            pieces.append(0 if is_codes else _decode(item, media_row["size"], reading, index.limits))
        except MediaError as error:
            raise MediaError(f"media {item.part.media!r} {error}") from None
    soft = [n * reading.loaded[m.part.modality].soft_tokens_per_piece if n else 0 for n, m in zip(pieces, media)]
    # Without a configuration there are no soft tokens, and the placeholder is never used.
    ids = {kind: entry.placeholder for kind, entry in reading.loaded.items()} or {m.part.modality: -1 for m in media}
    documents = [
        tokenizer.document(
            with_tokens(parts, [codes[n] for n in own]),
            [soft[n] for n in own if codes[n] is None],
            ids,
            closed=sample.closed,
        )
        for parts, own in zip(sample.documents, sample.item_numbers())
    ]
    return ReadSample(sample, media, pieces, documents)


def _tokens_of_codes(item: MediaBytes, reading: Reading) -> tuple[int, ...]:
    """Token ids of an item of codes; none without a configuration, which only reads it."""
    assert isinstance(item.part, CodesPart)
    if reading.codes is None:
        read_codes(item.data)
        return ()
    kind = CodesKind.parse(item.part.modality)
    assert kind is not None, "an index has a kind of codes for each item of codes"
    name = plan_codes(kind, reading.codes.sections, "it").name
    return reading.codes.tokens(name, item.data, generated=item.part.generated)


def _decode(item: MediaBytes, indexed_size: np.ndarray, reading: Reading, limits: LimitsConfig) -> int:
    """Decode a media item and return its number of pieces; 0 without a configuration."""
    kind = item.part.modality
    if kind not in MODALITIES:
        raise MediaError(f"has the unknown kind {kind!r}; load the file that registers it with --plugin")
    size = MODALITIES[kind].probe(item.data, item.extension, item.part.attributes, limits)
    if tuple(size) != tuple(float(n) for n in indexed_size):
        raise MediaError(f"has the size {tuple(size)}, but the index states {tuple(float(n) for n in indexed_size)}")
    if kind not in reading.modalities:
        return 0
    pieces = reading.modalities[kind].load_array(item.data, item.extension, item.part.attributes)
    return len(pieces) if reading.loaded else 0


def read_all(index: ShardIndex, numbers: Sequence[int], reading: Reading, workers: int) -> list[tuple[str, str]]:
    """Read samples on several threads and show a progress line.

    Returns:
        Key and error of each bad sample.
    """

    def why_bad(number: int) -> str:
        try:
            read_sample(index, number, reading)
        except (DataError, MediaError) as error:
            return str(error)
        return ""

    progress = Progress("reading samples", len(numbers))
    bad = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(numbers), _CHUNK):
            chunk = numbers[start : start + _CHUNK]
            for number, why in zip(chunk, pool.map(why_bad, chunk)):
                if why:
                    bad.append((index.key(number), why))
                progress.advance()
    progress.finish()
    return bad


def wrong_shards(index: ShardIndex) -> list[str]:
    """Errors about shards that are missing or have the wrong size."""
    try:
        index.check_shards()
    except DataError as error:
        return [str(error)]
    return []


def wrong_tokenizer(index: ShardIndex, tokenizer: Tokenizer, folder: str) -> list[str]:
    """An error if the index was built with a different tokenizer."""
    if index.header.tokenizer == tokenizer.fingerprint():
        return []
    return [
        f"The index was built with a different tokenizer than {folder!r}. Use that tokenizer, or rebuild the index: "
        f"anymal prepare --index-only {index.folder} --tokenizer {folder}"
    ]
