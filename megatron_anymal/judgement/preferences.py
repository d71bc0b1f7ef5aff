"""Judgements as preference pairs, for `anymal prepare` and `anymal dpo` (paper, section 3.3)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.judgement.items import JudgedItem
from megatron_anymal.judgement.results import latest


def preference_pairs(
    items: Iterable[JudgedItem], rows: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """One pair for each item that more annotators decided one way than the other.

    Args:
        items: of the comparison.
        rows: of its journal.
        folder: of the manifest, which media paths are relative to.

    Returns:
        The pairs as lines of a manifest, and why the other items have none, with their numbers.
    """
    votes: dict[str, list[int]] = {}
    for row in latest(rows):
        votes.setdefault(row["item"], []).append({"a": 1, "tie": 0, "b": -1}[row["choice"]])
    pairs: list[dict[str, Any]] = []
    without: Counter[str] = Counter()
    for item in items:
        lead = sum(votes.get(item.question.key, []))
        reason = _reason(item, votes.get(item.question.key), lead)
        if reason is not None:
            without[reason] += 1
            continue
        chosen, rejected = (item.a, item.b) if lead > 0 else (item.b, item.a)
        pairs.append(
            {
                "key": item.question.key,
                "messages": item.question.messages(_media_paths(item, folder)),
                "chosen": chosen,
                "rejected": rejected,
            }
        )
    return pairs, without


def write_pairs(path: Path, pairs: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    part.replace(path)


def _reason(item: JudgedItem, votes: Optional[list[int]], lead: int) -> Optional[str]:
    """Why an item has no pair; None if it has one."""
    if votes is None:
        return "not judged"
    if lead == 0:
        return "tie"
    if item.a == item.b:
        return "same answers"
    return None if item.a and item.b else "an empty answer"


def _media_paths(item: JudgedItem, folder: Path) -> list[str]:
    return [os.path.relpath(item.question.base / part.media, folder) for part in item.question.media]
