"""Validation of data.storage, of data.feature_cache and of the addresses of datasets."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_anymal.config.data_section import (
    DataConfig,
    FeatureCacheConfig,
    StorageConfig,
    is_remote,
    shows_credentials,
)
from megatron_anymal.config.model_section import ModalityConfig
from megatron_anymal.config.schema import ConfigError, ResilienceConfig

# A cache with room for fewer blocks would lose most of them before their second use.
_FEWEST_BLOCKS = 64


def check_storage(data: DataConfig, resilience: ResilienceConfig) -> None:
    """Reject addresses that hold credentials, and settings of data.storage that cannot work or have no effect.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    _check_addresses(data)
    if not data.remote_paths:
        if data.storage != StorageConfig():
            raise ConfigError("data.storage has no effect: all folders of data sets are local. Remove it.")
        return
    _check_cache(data.storage)
    storage, limit = data.storage, resilience.hang_timeout
    if 0 < limit <= storage.longest_wait:
        raise ConfigError(
            f"data.storage: {storage.attempts} attempts of {storage.timeout_seconds:g} s and the pauses between them "
            f"take up to {storage.longest_wait:.0f} s, but resilience.hang_timeout={limit:g} ends the run before. "
            "Lower attempts or timeout_seconds, or raise hang_timeout."
        )


def _check_addresses(data: DataConfig) -> None:
    for split in ("train", "validation"):
        for name, dataset in getattr(data, split).items():
            if shows_credentials(dataset.path):
                raise ConfigError(
                    f"data.{split}.{name}.path holds credentials or a query, which logs would show. Remove them: they "
                    "are found in the environment, a profile or the instance's role."
                )


def _check_cache(storage: StorageConfig) -> None:
    if is_remote(storage.cache_folder):
        raise ConfigError("data.storage.cache_folder must be a folder on a local disk, not an address. Correct it.")
    if not storage.cache_gib and storage.cache_block_kib != StorageConfig().cache_block_kib:
        raise ConfigError(
            "data.storage.cache_block_kib has no effect with data.storage.cache_gib=0. Set data.storage.cache_gib "
            "above 0, or remove data.storage.cache_block_kib."
        )
    if 0 < storage.cache_gib * 2**20 < _FEWEST_BLOCKS * storage.cache_block_kib:
        raise ConfigError(
            f"data.storage.cache_gib={storage.cache_gib} holds fewer than {_FEWEST_BLOCKS} blocks of "
            f"data.storage.cache_block_kib={storage.cache_block_kib}. Raise it, or set it to 0."
        )


def check_feature_cache(cache: FeatureCacheConfig, modalities: Mapping[str, ModalityConfig]) -> None:
    """Reject a cache of encoders that are trained, and settings of data.feature_cache that have no effect.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    section = "data.feature_cache"
    if not cache.gib:
        if cache != FeatureCacheConfig():
            raise ConfigError(
                f"{section} has no effect with {section}.gib=0. Set {section}.gib above 0, or remove the section."
            )
        return
    if is_remote(cache.folder):
        raise ConfigError(f"{section}.folder must be a folder on a local disk, not an address. Correct it.")
    for name in cache.modalities:
        if name not in modalities:
            raise ConfigError(
                f"{section}.modalities names {name!r}, which is not in model.modalities ({', '.join(modalities)}). "
                "Correct it."
            )
    for name in cache.names(modalities):
        if not modalities[name].encoder.freeze:
            raise ConfigError(
                f"{section} cannot cache features of {name!r}: its encoder is trained. Set "
                f"model.modalities.{name}.encoder.freeze=true, or list only the others in {section}.modalities."
            )
    if not modalities:
        raise ConfigError(f"{section}.gib={cache.gib} has no effect without model.modalities. Remove it.")
