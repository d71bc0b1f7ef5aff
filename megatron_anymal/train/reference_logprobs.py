"""Reference log-probabilities of preference pairs: computed once and cached in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor


class ReferenceAnswers:
    """Log-probabilities of chosen and rejected answers by pair name, the same on every rank.

    The file name is a hash of everything they depend on: another reference, base or precision gets another file.
    """

    def __init__(self, folder: Optional[Path], identity: Sequence[Any], device: torch.device):
        """Read the cache of an earlier execution. Collective.

        Args:
            folder: the cache; None to recompute every time.
            identity: everything that the values depend on.
        """
        self._device = device
        self._known: dict[str, tuple[float, float]] = {}
        digest = hashlib.sha256(json.dumps(list(identity), sort_keys=True).encode()).hexdigest()
        self._file = folder / f"{digest[:16]}.jsonl" if folder is not None else None
        if self._file is not None:
            read: list[Any] = [_read(self._file) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(read, src=0)
            self._known = read[0]

    def log_probabilities(self, names: Sequence[Optional[str]], ask: Callable[[], Tensor]) -> Tensor:
        """Return the log-probabilities of the named pairs, [n, 2] float64 on the device; zeros for None.

        Args:
            ask: computes [n, 2] for all pairs; called on all ranks together, or on none.
        """
        if self._file is None:
            return ask()
        wanted = [name for name in names if name is not None]
        if not all(name in self._known for name in wanted):
            computed = ask().cpu().tolist()
            new = {name: (row[0], row[1]) for name, row in zip(names, computed) if name is not None}
            new = {name: row for name, row in new.items() if name not in self._known}
            self._known.update(new)
            if dist.get_rank() == 0:
                _append(self._file, new)
        rows = [self._known[name] if name is not None else (0.0, 0.0) for name in names]
        return torch.tensor(rows, dtype=torch.float64, device=self._device).view(-1, 2)


def _read(file: Path) -> dict[str, tuple[float, float]]:
    if not file.is_file():
        return {}
    whole, _, partial = file.read_bytes().rpartition(b"\n")
    if partial:
        # A run was killed while writing this line.
        with file.open("r+b") as out:
            out.truncate(len(whole) + 1 if whole else 0)
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row["pair"]: (row["chosen"], row["rejected"]) for row in rows}


def _append(file: Path, new: dict[str, tuple[float, float]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        for name, (chosen, rejected) in new.items():
            out.write(json.dumps({"pair": name, "chosen": chosen, "rejected": rejected}) + "\n")
