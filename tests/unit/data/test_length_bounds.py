"""Samples that are too long are found with bounds as without them, and few rows are read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import modalities as modality_sections

from megatron_anymal.config import DatasetConfig, ModalityConfig
from megatron_anymal.data import length_bounds
from megatron_anymal.data.index_format import MEDIA, SAMPLE, IndexHeader
from megatron_anymal.data.index_writer import TableRows, write_index
from megatron_anymal.data.planner import BatchLayout, BatchPlanner, PlannedModality
from megatron_anymal.data.records import DataError
from megatron_anymal.modalities import MODALITIES, build_modality

SAMPLES, BLOCK = 2000, 16


class Kind:
    """A modality with a piece for every `size` units of the first number, and one more for odd ones if it is uneven."""

    def __init__(self, size: int, uneven: bool = False):
        self.size, self.piece_shape, self.uneven = size, (3, size), uneven
        self.pieces_grow_with_size = not uneven

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        pieces = np.clip(np.ceil(sizes[:, 0] / self.size), 1, 9).astype(np.int64)
        return pieces + 5 * (np.floor(sizes[:, 0]).astype(np.int64) % 7 == 1) if self.uneven else pieces


class AnyTokenizer:
    def fingerprint(self) -> str:
        return "t"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with up to three media items per sample: some blocks have too many groups."""
    return write_indexes(tmp_path_factory.mktemp("bounds"), 3)


def write_indexes(folder: Path, most_media: int) -> Path:
    """Write `new` with bounds and `old` without: pairs, media of two kinds, and a kind that no sample has."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, most_media + 1, SAMPLES)
    samples = np.zeros(SAMPLES, SAMPLE)
    samples["media_count"], samples["media_start"] = counts, np.cumsum(counts) - counts
    samples["tokens"] = np.minimum(rng.geometric(0.05, SAMPLES) + 3, 200)
    pairs = rng.uniform(size=SAMPLES) < 0.3
    samples["rejected_tokens"][pairs] = rng.integers(4, 50, int(pairs.sum()))
    samples["key_offset"], samples["key_length"] = np.arange(SAMPLES) * 4, 4
    media = np.zeros(int(counts.sum()), MEDIA)
    media["kind"], media["size"] = rng.choice([0, 2], len(media)), rng.geometric(0.02, (len(media), 2))
    header = IndexHeader((), (), ("audio", "imu", "image"), ("x",), "t")
    # Shards end within blocks; one has no samples.
    cuts = [0, 1, 1, 700, 703, 2000]
    tables = []
    for start, stop in itertools.pairwise(cuts):
        own = slice(int(counts[:start].sum()), int(counts[:stop].sum()))
        keys = b"".join(b"%04d" % number for number in range(start, stop))
        tables.append(TableRows(samples[start:stop], media[own], keys, {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length_bounds, "BLOCK", BLOCK)
        patch.setattr(length_bounds, "MAX_GROUPS", 8)
        patch.setattr("megatron_anymal.data.index_writer.BLOCK", BLOCK)
        write_index(str(folder / "new"), header, SAMPLES, len(media), tables)
    (folder / "old" / "index").mkdir(parents=True)
    for path in (folder / "new" / "index").iterdir():
        if path.name == "index.json":
            body = json.loads(path.read_text())
            del body["counts"]
            (folder / "old" / "index" / "index.json").write_text(json.dumps(body))
        elif path.name != "bounds.npy":
            (folder / "old" / "index" / path.name).write_bytes(path.read_bytes())
    return folder


def modalities(uneven: bool) -> Any:
    return [PlannedModality("i", "image", Kind(40), 7), PlannedModality("a", "audio", Kind(90, uneven), 5)]  # type: ignore[arg-type]


def outcome(folder: Path, seq_length: int, kinds: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """The error, or "", and the number of rows that were read."""
    rows = 0
    measure = BatchPlanner.measure

    def counting(self: BatchPlanner, index: Any, sample: np.ndarray) -> Any:
        nonlocal rows
        rows += len(sample)
        return measure(self, index, sample)

    with monkeypatch.context() as patch:
        patch.setattr(BatchPlanner, "measure", counting)
        tokenizer: Any = AnyTokenizer()
        datasets = {"a": DatasetConfig(path=str(folder))}
        try:
            BatchPlanner(datasets, kinds, tokenizer, BatchLayout(1, 1, seq_length), global_batch_size=2, seed=1)
        except DataError as error:
            return str(error), rows
        return "", rows


@pytest.mark.parametrize("uneven", [False, True])
def test_the_same_samples_are_refused(folder: Path, uneven: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = read = 0
    for seq_length in range(60, 720, 12):
        old, every = outcome(folder / "old", seq_length, modalities(uneven), monkeypatch)
        new, some = outcome(folder / "new", seq_length, modalities(uneven), monkeypatch)
        assert new == old, seq_length
        assert every == SAMPLES and some <= SAMPLES
        refused, read = refused + bool(old), read + (some < SAMPLES)
    assert 10 < refused < 50
    # A modality without monotonic sizes has samples in every block.
    assert read == 0 if uneven else read > 40


def test_few_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_indexes(tmp_path, 1)
    longest = next(n for n in range(100, 900) if not outcome(folder / "old", n, modalities(False), monkeypatch)[0])
    assert outcome(folder / "new", longest, modalities(False), monkeypatch)[1] < SAMPLES / 10
    assert outcome(folder / "new", 1000, modalities(False), monkeypatch) == ("", 0)


def test_bounds_that_are_missing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").mkdir()
    for path in (folder / "new" / "index").iterdir():
        (tmp_path / "index" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "index" / "bounds.npy").unlink()
    assert "is incomplete. Rebuild it" in outcome(tmp_path, 1000, modalities(False), monkeypatch)[0]


def test_a_size_that_is_not_a_number_is_read(folder: Path) -> None:
    table = np.zeros(3, length_bounds.bound_type(1))
    table["block"], table["media"] = np.arange(3), 1
    table["size"][1, 0, 0] = np.nan
    planned: Any = PlannedModality("i", "image", Kind(40), 7)  # type: ignore[arg-type]
    bounds = length_bounds.LengthBounds(table, 4)
    with np.errstate(invalid="ignore"):
        assert bounds.exceeding(100, ["image"], {"image": planned}).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", sorted(kind for kind, cls in MODALITIES.items() if cls.pieces_grow_with_size))
def test_pieces_of_the_modalities_grow_with_the_size(kind: str) -> None:
    sections = modality_sections()
    config = sections.get(kind, ModalityConfig(encoder=sections["image"].encoder, options={"num_frames": 4}))
    rng = np.random.default_rng(0)
    small = np.concatenate([rng.uniform(0.02, 50, (2000, 2)), rng.integers(1, 3000, (2000, 2)).astype(float)])
    large = small + rng.choice([0.0, 1e-9, 0.3, 7.0, 500.0], small.shape)
    options = {"image": [{"max_grid": 3}, {"overview": False}], "video": [{"max_clips": 9}]}
    for more in [{}, *options.get(kind, [{"max_pieces": 9}])]:
        config.options = {**config.options, **more}
        modality = build_modality(kind, config)
        assert (modality.count_pieces(large) >= modality.count_pieces(small)).all()
