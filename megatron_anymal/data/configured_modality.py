"""The properties of a configured modality that planning and loading need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_anymal.modalities.base import Modality


@dataclass(frozen=True)
class PlannedModality:
    """The properties of a configured modality that planning needs."""

    # Name in the configuration.
    name: str
    # Kind of media, as in the index.
    kind: str
    # Counts the pieces of a media item.
    modality: Modality
    # Number of LLM tokens of each piece.
    soft_tokens_per_piece: int

    @property
    def cost_per_piece(self) -> float:
        """Estimated encoder cost of one piece: its number of input elements."""
        return float(np.prod(self.modality.piece_shape))


@dataclass(frozen=True)
class LoadedModality:
    """The properties of a configured modality that loading needs."""

    # Decodes the media.
    modality: Modality
    # Number of LLM tokens of each piece.
    soft_tokens_per_piece: int
    # Token id at the positions of soft tokens.
    placeholder: int
