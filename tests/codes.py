"""Small discrete media: sections, files of codes, and shards of samples with them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from megatron_anymal.config import DiscreteConfig, RunConfig


def sections() -> dict[str, DiscreteConfig]:
    """Ids after a vocabulary of 32: <picture> 32, </picture> 33, its codes 34 to 38; <speech> 39, </speech> 40, its
    content codes 41 to 44 and its timbre codes 45 to 48."""
    return {
        "picture": DiscreteConfig(codebooks=[5], codes_per_item=3),
        "speech": DiscreteConfig(codebooks=[4, 4]),
    }


def with_codes(config: RunConfig) -> RunConfig:
    """The configuration with discrete media added."""
    config.model.discrete = sections()
    return config


def codes(values: Any, dtype: str = "int16") -> bytes:
    """A file of codes."""
    file = io.BytesIO()
    np.save(file, np.array(values, dtype))
    return file.getvalue()


def item(name: str, modality: str, **more: Any) -> dict[str, Any]:
    """A part of a sample with codes."""
    return {"media": f"{name}.codes.npy", "modality": modality, **more}
