"""The feature cache of a run: opened for its encoders, filled while it trains."""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from megatron_anymal.config import ConfigError, FeatureCacheConfig
from megatron_anymal.data.feature_cache import FeatureCache, PieceKey
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.modalities import Modality
from megatron_anymal.model.encoder_identity import encoder_identity
from megatron_anymal.model.encoders import Encoder
from megatron_anymal.object_storage.cache_folder import cache_folder
from megatron_anymal.object_storage.daemon_pool import DaemonPool
from megatron_anymal.object_storage.errors import StorageError
from megatron_anymal.processes.process_memory import GIB

if TYPE_CHECKING:
    # Imports megatron-core, which `anymal encode` does without.
    from megatron_anymal.train.build import TrainState

# A cache with room for fewer entries would lose most of them before their second use.
_FEWEST_ENTRIES = 64
# Encoder calls whose features may wait for the disk.
_PENDING = 4
# Largest relative difference between the features of the same encoder on different devices of the same kind.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.03


def use_feature_cache(state: TrainState) -> FeatureWriter:
    """Let this rank's readers take features from the run's cache, and its model fill it.

    To be called when the encoders have their final weights. Does nothing if the run has no cache, if its folder cannot
    be written (which is said on standard error), or if this rank has no encoders.

    Raises:
        ConfigError: see `open_caches`.
    """
    section: FeatureCacheConfig = state.config.data.feature_cache
    encoders: Any = state.models[0].encoders
    if state.stage_encoding is not None:
        state.stage_encoding.take_weights()
        encoders = state.stage_encoding.encoders
    caches: dict[str, FeatureCache] = {}
    if section.names(encoders.keys()):
        try:
            caches = open_caches(section, open_folder(section), state.modalities, dict(encoders))
        except StorageError as error:
            print(f"warning: {error} Training continues without the feature cache.", file=sys.stderr, flush=True)
    writer = FeatureWriter(caches)
    for data in (state.train_data, state.validation_data):
        if data is not None:
            data.reader.use_caches(caches)
    state.models[0].store_features = writer.store
    if state.stage_encoding is not None:
        state.stage_encoding.store = writer.store
    return writer


def open_folder(section: FeatureCacheConfig) -> Path:
    """Create the cache's folder.

    Raises:
        StorageError: it cannot be created or written.
    """
    return cache_folder(section.folder, "data.feature_cache.folder", "features")


def open_caches(
    section: FeatureCacheConfig, folder: Path, modalities: Mapping[str, Modality], encoders: Mapping[str, Encoder]
) -> dict[str, FeatureCache]:
    """Open the caches of frozen encoders, by the modality's name.

    Args:
        folder: see `open_folder`.
        encoders: with their weights, on the device that encodes.

    Raises:
        ConfigError: an encoder is trained, the cache is too small, or it holds another encoder's features.
    """
    return {
        name: _open(name, section, folder, modalities[name], encoders[name]) for name in section.names(encoders.keys())
    }


def _open(name: str, section: FeatureCacheConfig, folder: Path, modality: Modality, encoder: Encoder) -> FeatureCache:
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ConfigError(f"data.feature_cache cannot cache features of {name!r}: its encoder is trained.")
    shape = (encoder.feature_tokens, encoder.width)
    cache = FeatureCache(folder, int(section.gib * GIB), encoder_identity(modality, encoder), shape, encoder.dtype)
    if section.gib * GIB < _FEWEST_ENTRIES * cache.entry_bytes:
        raise ConfigError(
            f"data.feature_cache.gib={section.gib} holds fewer than {_FEWEST_ENTRIES} pieces of {name!r}, of "
            f"{cache.entry_bytes} bytes each. Raise it, or set it to 0."
        )
    check_probe(name, cache, encoder)
    return cache


def check_probe(name: str, cache: FeatureCache, encoder: Encoder) -> None:
    """Encode a fixed piece and compare with its features in the cache, which then gets them if it has none.

    This finds encoders that differ in something that their identity does not cover, such as a file that a plug-in's
    encoder reads.

    Raises:
        ConfigError: the features differ by more than rounding.
    """
    # Not from the device's generator, whose numbers depend on the device.
    piece = torch.rand(1, *encoder.piece_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder(piece.to(encoder.device))[0].cpu().contiguous()
    key, kept = PieceKey("probe", 1, 0), torch.empty_like(features)
    if not cache.read(key, kept):
        try:
            cache.add(key, features)
        except OSError:
            # Reported when the first features are stored.
            return
    elif not _close(features, kept):
        raise ConfigError(
            f"data.feature_cache: {str(cache.folder)!r} holds features of another encoder of {name!r}, although its "
            "weights, settings and code are the same. Delete the folder, or name another in data.feature_cache.folder."
        )


def _close(features: Tensor, kept: Tensor) -> bool:
    difference = (features.double() - kept.double()).norm()
    return bool(difference <= _TOLERANCE.get(features.dtype, _TOLERANCE_16_BITS) * features.double().norm())


class FeatureWriter:
    """Stores features in a thread, so that training does not wait for the disk unless that falls far behind.

    If the disk is full or the folder cannot be written, a line on standard error says so once, and nothing further is
    stored.
    """

    def __init__(self, caches: Mapping[str, FeatureCache]):
        self._caches = caches
        self._thread: Optional[DaemonPool] = None
        self._pending: deque[Future[None]] = deque()
        self._failed = False
        # This rank's pieces since the last `metrics`: those from the cache, and all.
        self._cached, self._pieces = 0, 0

    def store(self, name: str, keys: Sequence[Optional[PieceKey]], features: Tensor) -> None:
        """Store the features of pieces; see AnyMALModel.store_features.

        Args:
            features: [n, feature tokens, width], on any device.
        """
        if self._failed or name not in self._caches:
            return
        self._thread = self._thread or DaemonPool(1)
        while len(self._pending) >= _PENDING:
            self._pending.popleft().result()
        copy, wait = _to_host(features)
        self._pending.append(self._thread.submit(self._write, self._caches[name], keys, copy, wait))

    def count(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Count the pieces of a step."""
        for features in (media.features for m in micro_batches for media in m.media.values()):
            if features is not None:
                self._cached += len(features.index)
                self._pieces += len(features.index) + len(features.missing)

    def metrics(self) -> dict[str, float]:
        """Share of the pieces since the last call that were in the cache, on this rank; empty without pieces."""
        share = {"cached_features_share": self._cached / self._pieces} if self._pieces else {}
        self._cached = self._pieces = 0
        return share

    def finish(self) -> None:
        """Wait until everything is stored."""
        while self._pending:
            self._pending.popleft().result()

    def _write(
        self, cache: FeatureCache, keys: Sequence[Optional[PieceKey]], features: Tensor, wait: Callable[[], Any]
    ) -> None:
        wait()
        try:
            for key, row in zip(keys, features):
                if key is not None and not self._failed:
                    cache.add(key, row)
        except OSError as error:
            self._failed = True
            _warn(str(cache.folder), error)


def _warn(folder: str, error: OSError) -> None:
    """Say on standard error, where every rank can, that features are not stored."""
    print(
        f"warning: features cannot be stored in {folder!r} on {socket.gethostname()} ({error}). Training continues "
        "without storing further ones. Free space, or set data.feature_cache.folder or gib.",
        file=sys.stderr,
        flush=True,
    )


def _to_host(features: Tensor) -> tuple[Tensor, Callable[[], Any]]:
    """A copy in host memory, and a function that waits until it is complete."""
    if features.device.type == "cpu":
        # Encoder outputs are never changed in place.
        return features.contiguous(), lambda: None
    copy = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    copy.copy_(features, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event.synchronize
