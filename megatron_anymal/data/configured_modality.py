"""The properties of a configured modality that planning and loading need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

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

    # Encoder cost of one piece, in a unit that is the same for all modalities; None: its number of input elements.
    cost: Optional[float] = None

    @property
    def cost_per_piece(self) -> float:
        """Encoder cost of one piece."""
        return float(np.prod(self.modality.piece_shape)) if self.cost is None else self.cost


def integer_costs(costs: Sequence[float]) -> list[int]:
    """Costs in units of 2**-20 of the highest one, at least 1, so that sums do not depend on their order."""
    # Encoders that only pass features on may have no cost at all.
    highest = max(costs, default=0.0) or 1.0
    return [max(1, round(cost / highest * 2**20)) for cost in costs]


@dataclass(frozen=True)
class LoadedModality:
    """The properties of a configured modality that loading needs."""

    # Decodes the media.
    modality: Modality
    # Number of LLM tokens of each piece.
    soft_tokens_per_piece: int
    # Token id at the positions of soft tokens.
    placeholder: int
