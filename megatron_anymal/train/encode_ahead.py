"""Filling the feature cache ahead of training, by one or several processes.

Every piece that is in the cache already is left out, so that an interrupted filling continues where it was.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from megatron_anymal import backend, lean_imports
from megatron_anymal.config import RunConfig
from megatron_anymal.data.feature_cache import PieceKey, item_digest
from megatron_anymal.data.records import DataError, MediaPart
from megatron_anymal.data.shard_index import MediaBytes, ShardIndex
from megatron_anymal.modalities import Modality, build_modality, load_plugins
from megatron_anymal.modalities.base import MediaError
from megatron_anymal.model.encoders import Encoder, seeded_encoder
from megatron_anymal.object_storage.errors import StorageError
from megatron_anymal.processes.child_processes import end_with_parent
from megatron_anymal.processes.process_memory import GIB
from megatron_anymal.telemetry import Progress
from megatron_anymal.train.feature_cache import open_caches, open_folder

# Samples that a process takes at a time.
_SAMPLES = 32


class ProcessKilled(DataError):
    """A process that was encoding has been killed."""

    exit_code = 1


@dataclass
class Filled:
    """What was done for some samples."""

    # Pieces that were encoded and stored.
    encoded: int = 0
    # Pieces that were in the cache.
    present: int = 0
    # Samples that cannot be read: name and reason.
    bad: list[str] = field(default_factory=list)

    def add(self, other: Filled) -> None:
        """Add what was done for further samples."""
        self.encoded += other.encoded
        self.present += other.present
        self.bad += other.bad


@dataclass(frozen=True)
class SampleSpan:
    """Consecutive samples of a folder."""

    # The folder.
    folder: str
    # First sample.
    start: int
    # The one after the last.
    stop: int


def fill(config: RunConfig, processes: int, warn: Callable[[str], None]) -> Filled:
    """Encode the media of all data sets of a run. Progress and the time left go to standard error.

    Args:
        processes: number of processes; on a machine with GPUs they use all of them in turns.
        warn: prints a warning.

    Raises:
        ConfigError: the cache or an encoder cannot be used.
        DataError, StorageError: an index or an object store cannot be read, or the cache cannot be written.
        ProcessKilled: a process was killed.
    """
    filler, limit = _Filler(config), config.data.feature_cache.gib
    required = sum(filler.required_bytes(folder) for folder in _folders(config)) / GIB
    if required > limit:
        warn(
            f"warning: the features take up to {required:.3g} GiB, but data.feature_cache.gib={limit}: those used "
            "least recently will be removed. Raise it."
        )
    spans = [span for folder in _folders(config) for span in _spans(folder, len(filler.index(folder)))]
    progress = Progress("encoding media", sum(span.stop - span.start for span in spans), "samples")
    total = Filled()
    one = ((span, filler.fill(span)) for span in spans)
    for span, filled in _in_processes(config, spans, processes) if processes > 1 else one:
        total.add(filled)
        progress.advance(span.stop - span.start)
    progress.finish()
    return total


def _folders(config: RunConfig) -> list[str]:
    datasets = (*config.data.train.values(), *config.data.validation.values())
    return list(dict.fromkeys(dataset.path for dataset in datasets))


def _spans(folder: str, samples: int) -> Iterator[SampleSpan]:
    for start in range(0, samples, _SAMPLES):
        yield SampleSpan(folder, start, min(samples, start + _SAMPLES))


class _Filler:
    """Encodes what the caches lack, on one device.

    Args:
        device: None: the CPU, or the first GPU if there is one.
    """

    def __init__(self, config: RunConfig, device: Optional[torch.device] = None):
        model, self._data = config.model, config.data
        load_plugins(model.plugins)
        self._device = device or _device(0)
        dtype = backend.compute_dtype(config.trainer.precision)
        self._modalities: dict[str, Modality] = {}
        self._encoders: dict[str, Encoder] = {}
        self._calls: dict[str, int] = {}
        for name in self._data.feature_cache.names(model.modalities):
            section = model.modalities[name]
            modality = build_modality(name, section, self._data.limits)
            encoder = seeded_encoder(name, section.encoder, modality, model.seed)
            self._modalities[name] = modality
            self._encoders[name] = encoder.requires_grad_(False).to(dtype).to(self._device)
            self._calls[name] = section.encoder.max_pieces_per_call
        # Kind of media -> name of the modality that reads it.
        self._names = {model.modalities[name].kind or name: name for name in self._modalities}
        folder = open_folder(self._data.feature_cache)
        self._caches = open_caches(self._data.feature_cache, folder, self._modalities, self._encoders)
        self._indexes: dict[str, ShardIndex] = {}

    def index(self, folder: str) -> ShardIndex:
        """The index of a folder, opened once."""
        if folder not in self._indexes:
            self._indexes[folder] = ShardIndex(folder, self._data.limits, self._data.storage)
        return self._indexes[folder]

    def required_bytes(self, folder: str) -> int:
        """Size of the features of a folder's media."""
        index, size = self.index(folder), 0
        for number, kind in enumerate(index.header.kinds):
            name = self._names.get(kind)
            if name is not None:
                rows = index.media["size"][index.media["kind"] == number]
                pieces = int(self._modalities[name].count_pieces(np.asarray(rows)).sum())
                size += pieces * self._caches[name].entry_bytes
        return size

    def fill(self, span: SampleSpan) -> Filled:
        """Encode the media of some samples.

        Raises:
            StorageError: the object store cannot be read, or the cache cannot be written.
        """
        filled = Filled()
        waiting: dict[str, list[tuple[PieceKey, Tensor]]] = {name: [] for name in self._modalities}
        for sample in range(span.start, span.stop):
            try:
                for name, key, piece in self._missing(self.index(span.folder), sample, filled):
                    waiting[name].append((key, piece))
                    if len(waiting[name]) == self._calls[name]:
                        filled.encoded += self._encode(name, waiting[name])
            except (DataError, MediaError) as error:
                filled.bad.append(f"{self.index(span.folder).key(sample)}: {error}")
        for name, pieces in waiting.items():
            if pieces:
                filled.encoded += self._encode(name, pieces)
        return filled

    def _missing(self, index: ShardIndex, sample: int, filled: Filled) -> Iterator[tuple[str, PieceKey, Tensor]]:
        """The pieces of a sample that are not in the caches; those that are, are counted."""
        parts = index.sample(sample).documents[0]
        kinds = [part.modality for part in parts if isinstance(part, MediaPart)]
        for number, kind in enumerate(kinds):
            name = self._names.get(kind)
            if name is None:
                continue
            [media] = index.read_media(sample, parts, [number])
            size = index.media_rows(sample)[number]["size"]
            count = int(self._modalities[name].count_pieces(size[None])[0])
            keys = [PieceKey(item_digest(media), count, piece) for piece in range(count)]
            lacking = [key for key in keys if not self._caches[name].holds(key)]
            filled.present += len(keys) - len(lacking)
            if lacking:
                decoded = self._decode(name, media, count)
                yield from ((name, key, decoded[key.number]) for key in lacking)

    def _decode(self, name: str, media: MediaBytes, count: int) -> Tensor:
        modality = self._modalities[name]
        out = np.empty((count, *modality.piece_shape), dtype=np.float32)
        return torch.from_numpy(modality.load_array(media.data, media.extension, media.part.attributes, out))

    def _encode(self, name: str, pieces: list[tuple[PieceKey, Tensor]]) -> int:
        """Encode and store pieces, and empty the list; returns how many there were."""
        batch = torch.stack([piece for _, piece in pieces]).to(self._device)
        with torch.no_grad():
            features = self._encoders[name](batch).cpu()
        try:
            for (key, _), row in zip(pieces, features):
                self._caches[name].add(key, row.contiguous())
        except OSError as error:
            raise StorageError(
                f"Features cannot be stored in {str(self._caches[name].folder)!r} ({error}). Free space, or set "
                "data.feature_cache.folder or gib; what is stored stays."
            ) from None
        count = len(pieces)
        pieces.clear()
        return count


def _device(number: int) -> torch.device:
    """The device of a process; processes use the GPUs in turns."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", number % torch.cuda.device_count())


def _in_processes(config: RunConfig, spans: list[SampleSpan], processes: int) -> Iterator[tuple[SampleSpan, Filled]]:
    # A fork would copy the state of a GPU and locks of other threads.
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    pool = ProcessPoolExecutor(processes, context, lean_imports.call, (f"{__name__}:_start_process", config, numbers))
    try:
        jobs = {pool.submit(_fill, span): span for span in spans}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool:
        raise ProcessKilled(
            f"One of {processes} processes that encode media was killed, or could not start. Often the machine ran out "
            "of memory: lower --processes, and start again; what is stored stays."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# In an encoding process, set at its start.
_filler: Optional[_Filler] = None


def _start_process(config: RunConfig, numbers: multiprocessing.Queue[int]) -> None:
    global _filler
    end_with_parent()
    torch.set_num_threads(1)
    _filler = _Filler(config, _device(numbers.get()))


def _fill(span: SampleSpan) -> Filled:
    assert _filler is not None
    return _filler.fill(span)
