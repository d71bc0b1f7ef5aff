"""A comparison of two models by annotators: who has judged what, and which answer each of them sees first."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.data.journal import Journal
from megatron_anymal.data.records import DataError
from megatron_anymal.judgement.items import JudgedItem
from megatron_anymal.judgement.rubrics import RUBRICS

_NAME = re.compile(r"[\w.@+-]([\w .@+-]{0,62}[\w.@+-])?")
# Longest time on an item that is recorded, in seconds.
_LONGEST = 86_400.0


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Store the settings of a comparison, or check that a continued one has the same.

    Raises:
        DataError: the stored ones differ, or cannot be read; the message names the first difference.
    """
    if not path.is_file():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
        part.replace(path)
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{str(path)!r} is damaged ({error}). Name another --out.") from None
    different = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
    if different:
        name = different[0]
        raise DataError(
            f"The comparison in {str(path.parent)!r} was begun with other values of {name!r} ({path.name}). Name "
            "another --out, or restore them."
        )


def first_shown(seed: int, annotator: str, key: str) -> str:
    """The model, `a` or `b`, whose answer an annotator sees first: a fair coin that depends on all arguments."""
    digest = hashlib.sha256(json.dumps([seed, annotator, key]).encode()).digest()
    return "ab"[digest[0] & 1]


class Comparison:
    """Items and the judgements of all annotators; any number of threads may use it."""

    def __init__(self, items: Sequence[JudgedItem], journal: Journal, seed: int) -> None:
        """Continue with the judgements in the journal.

        Raises:
            DataError: the journal has a judgement of an item that does not exist.
        """
        self.items, self._journal, self._seed = list(items), journal, seed
        self._numbers = {item.question.key: number for number, item in enumerate(items)}
        self._lock = threading.Lock()
        # By annotator and number of the item.
        self._judgements: dict[tuple[str, int], dict[str, Any]] = {}
        for row in journal.rows:
            if row.get("item") not in self._numbers:
                raise DataError(f"The journal has a judgement of the item {row.get('item')!r}, which does not exist.")
            self._judgements[row["annotator"], self._numbers[row["item"]]] = row

    def judged(self, annotator: str) -> list[int]:
        """Numbers of the items that an annotator has judged, in ascending order."""
        with self._lock:
            return sorted(number for name, number in self._judgements if name == annotator)

    def shown(self, annotator: str, number: int) -> dict[str, Any]:
        """The two answers to an item in the annotator's order, and the earlier judgement, if any, in the same terms."""
        item = self.items[number]
        order = self._order(annotator, item)
        with self._lock:
            row = self._judgements.get((annotator, number))
        judgement = row and {
            "choice": "tie" if row["choice"] == "tie" else ("first", "second")[order.index(row["choice"])],
            "scores": [row["scores"][model] for model in order],
        }
        return {"answers": [getattr(item, model) for model in order], "judgement": judgement}

    def record(self, annotator: str, number: int, choice: Any, scores: Any, seconds: Any) -> None:
        """Keep a judgement; a later one of the same item and annotator replaces it. On disk when this returns.

        Args:
            choice: `first`, `second` or `tie`.
            scores: rubric -> score, for the first and the second answer.
            seconds: time that the annotator took.

        Raises:
            DataError: one of them has another form.
            OSError: the journal cannot be written.
        """
        if choice not in ("first", "second", "tie"):
            raise DataError(f"choice={choice!r} must be first, second or tie.")
        if not isinstance(scores, list) or len(scores) != 2:
            raise DataError("`scores` must be two objects, for the first and the second answer.")
        item = self.items[number]
        order = self._order(annotator, item)
        row = {
            "item": item.question.key,
            "annotator": annotator,
            "choice": {"first": order[0], "second": order[1], "tie": "tie"}[choice],
            "first": order[0],
            "scores": {model: _checked(given) for model, given in sorted(zip(order, scores))},
            "seconds": _seconds(seconds),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._journal.append(row)
        with self._lock:
            self._judgements[annotator, number] = row

    def _order(self, annotator: str, item: JudgedItem) -> str:
        return "ab" if first_shown(self._seed, annotator, item.question.key) == "a" else "ba"


def annotator_name(given: Optional[str]) -> str:
    """Check the name of an annotator.

    Raises:
        DataError: it is missing, too long, or has characters other than letters, digits, spaces and _ . @ + -.
    """
    name = (given or "").strip()
    if not _NAME.fullmatch(name):
        raise DataError("An annotator's name has 1 to 64 letters, digits, spaces or any of _ . @ + -.")
    return name


def _checked(given: Any) -> dict[str, int]:
    """An answer's scores.

    Raises:
        DataError: a rubric is missing or unknown, or its score does not exist.
    """
    if not isinstance(given, dict) or given.keys() != {rubric.name for rubric in RUBRICS}:
        raise DataError(f"An answer's scores are an object with {', '.join(rubric.name for rubric in RUBRICS)}.")
    for rubric in RUBRICS:
        score = given[rubric.name]
        if type(score) is not int or score not in rubric.scores:
            raise DataError(f"{rubric.name}={score!r} must be one of {', '.join(map(str, rubric.scores))}.")
    return {rubric.name: given[rubric.name] for rubric in RUBRICS}


def _seconds(given: Any) -> Optional[float]:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < _LONGEST:
        return None
    return round(float(given), 1)
