"""Rules of `anymal prepare --filter`: which samples are kept out of an index.

    RULE     = BOUND "=" NUMBER | "column:" NAME "=" VALUE {"," VALUE} | "integrity=" FILE
    BOUND    = ("min_" | "max_") QUANTITY
    QUANTITY = "side" | "pixels" | "aspect" | "seconds" | "words" | "characters" | "column:" NAME

Bounds are inclusive. A rule about media applies to each medium of the sample that has the quantity: `side` (the shorter
side in pixels), `pixels` (width x height) and `aspect` (longer / shorter side) to images, `seconds` to videos, audio
and IMU signals. `words` and `characters` count the text that the sample's loss covers. A column is a further value that
the source lists for the sample, such as a CLIP score. An integrity file names classifiers of texts and media.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Protocol, TypeVar, Union

from megatron_anymal.data.left_out import FILTERED
from megatron_anymal.data.records import DataError, MediaPart, Sample, TextPart
from megatron_anymal.data.shard_samples import SampleError

_OF_IMAGES, _OF_TIMES, _OF_TEXT = ("side", "pixels", "aspect"), ("seconds",), ("words", "characters")
_QUANTITIES = (*_OF_IMAGES, *_OF_TIMES, *_OF_TEXT)
_COLUMN = "column:"
_INTEGRITY = "integrity"
# Kinds whose `Modality.probe` returns width and height, and those for which it returns seconds first.
_IMAGES, _TIMED = ("image",), ("video", "audio", "imu")
# Contents are checked in batches of at most this many samples and about this many bytes of media: half of what a reader
# of shards on object storage keeps behind its position.
_TOGETHER, _TOGETHER_BYTES = 64, 16 * 2**20
Item = TypeVar("Item")


class ContentCheck(Protocol):
    """A rule about what the texts and media of a sample show."""

    def fingerprint(self) -> str:
        """Hash of everything that its decisions depend on."""

    def summary(self) -> str:
        """One line: samples checked and excluded, and the time that it took."""

    def refusals(self, samples: Sequence[Facts]) -> list[Union[str, SampleError]]:
        """For each sample, why it is excluded, empty if it is not; or the error of one that cannot be checked.

        Args:
            samples: with `sample` and `read`.
        """


@dataclass(frozen=True)
class Facts:
    """The values that rules are applied to."""

    # The text that the loss covers.
    text: str
    # Kind and the two numbers of `Modality.probe`, for each media item.
    media: Sequence[tuple[str, float, float]]
    # Further values that the source lists.
    columns: Mapping[str, Any]
    # The whole sample; for rules about content.
    sample: Optional[Sample] = None
    # Reads the content of one of its media parts.
    read: Optional[Callable[[MediaPart], bytes]] = None


@dataclass(frozen=True)
class Rule:
    """One rule."""

    # As the user wrote it.
    text: str
    # One of the quantities, "column:NAME" or "integrity".
    quantity: str
    # Lower bound; None if there is none.
    least: Optional[float] = None
    # Upper bound; None if there is none.
    most: Optional[float] = None
    # The values that a column may have, instead of bounds.
    values: tuple[str, ...] = ()
    # The check of the sample's content, instead of a quantity.
    check: Optional[ContentCheck] = None

    @property
    def identity(self) -> str:
        """Everything that its decisions depend on."""
        return f"{self.text} {self.check.fingerprint()}" if self.check else self.text

    @property
    def column(self) -> str:
        """Name of the column that the rule reads; empty if it reads none."""
        return self.quantity.removeprefix(_COLUMN) if self.quantity.startswith(_COLUMN) else ""

    def errors(self, samples: Sequence[Facts]) -> list[Optional[SampleError]]:
        """For each sample, why it cannot be used: the rule excludes it, or a column or content cannot be checked."""
        reasons = self.check.refusals(samples) if self.check else [self._refusal(facts) for facts in samples]
        return [FilteredError(self, one) if isinstance(one, str) and one else one or None for one in reasons]

    def _refusal(self, facts: Facts) -> Union[str, SampleError]:
        try:
            return self._reason(facts)
        except SampleError as error:
            return error

    def _reason(self, facts: Facts) -> str:
        if self.values:
            value = str(self._listed(facts))
            return "" if value in self.values else f"{self.column} is {value!r}"
        for number, what in self._numbers(facts):
            if (self.least is not None and number < self.least) or (self.most is not None and number > self.most):
                return f"{what}, {self.quantity.removeprefix(_COLUMN)} {number:g}"
        return ""

    def _numbers(self, facts: Facts) -> Iterator[tuple[float, str]]:
        """Values of the quantity, each with a description of what has it."""
        if self.column:
            value = self._listed(facts)
            try:
                yield float(value), "its column"
            except (TypeError, ValueError):
                raise SampleError("column", f"its {self.column!r} is {value!r}, not a number ({self.text}).") from None
        elif self.quantity in _OF_TEXT:
            yield float(len(facts.text.split() if self.quantity == "words" else facts.text)), "its text"
        for kind, first, second in facts.media:
            if self.quantity in _OF_TIMES and kind in _TIMED:
                yield first, f"its {kind}"
            elif self.quantity in _OF_IMAGES and kind in _IMAGES:
                short, long = sorted((first, second))
                values = {"side": short, "pixels": short * long, "aspect": long / max(short, 1.0)}
                yield values[self.quantity], f"its image of {first:g} x {second:g}"

    def _listed(self, facts: Facts) -> Any:
        value = facts.columns.get(self.column)
        if value is None:
            known = ", ".join(map(str, facts.columns)) or "none"
            raise SampleError(
                "column", f"it has no column {self.column!r} for --filter {self.text}; its columns: {known}."
            )
        return value


class FilteredError(SampleError):
    """A sample that a rule excludes."""

    def __init__(self, rule: Rule, reason: str):
        super().__init__(FILTERED, f"{rule.text}: {reason}.")
        self.rule = rule.text


def parse_rules(
    texts: Iterable[str], open_integrity: Optional[Callable[[str], ContentCheck]] = None
) -> tuple[Rule, ...]:
    """Parse rules.

    Args:
        open_integrity: reads an integrity file.

    Raises:
        ConfigError: an integrity file cannot be used.
        DataError: naming the rule and the grammar.
    """
    return tuple(_rule(text, open_integrity) for text in texts)


def apply_rules(rules: Iterable[Rule], samples: Sequence[Facts]) -> list[Optional[SampleError]]:
    """Check samples.

    Returns:
        For each sample a FilteredError with the first rule that excludes it, another SampleError if it lacks a column
        or cannot be checked, or None if it is kept.
    """
    errors: list[Optional[SampleError]] = [None] * len(samples)
    for rule in rules:
        kept = [number for number, error in enumerate(errors) if error is None]
        for number, error in zip(kept, rule.errors([samples[number] for number in kept])):
            errors[number] = error
    return errors


def checked_together(
    rules: Iterable[Rule], samples: Iterable[Item], media_bytes: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Group consecutive samples for `apply_rules`: one by one, unless a rule checks contents.

    Args:
        media_bytes: bytes of a sample's media, which stay in memory until its group is checked.
    """
    most = _TOGETHER if any(rule.check for rule in rules) else 1
    group: list[Item] = []
    held = 0
    for sample in samples:
        group.append(sample)
        held += media_bytes(sample)
        if len(group) >= most or held >= _TOGETHER_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group


def learned_text(sample: Sample) -> str:
    """The text of a sample that the loss covers, without control tokens."""
    parts = (part for part in sample.documents[0] if isinstance(part, TextPart))
    return "".join(part.text for part in parts if part.loss and not part.control)


def _rule(text: str, open_integrity: Optional[Callable[[str], ContentCheck]]) -> Rule:
    name, equals, value = text.partition("=")
    if not equals or not value:
        raise _unreadable(text, "it has no `=` with a value behind it")
    if name == _INTEGRITY and open_integrity:
        return Rule(text, name, check=open_integrity(value))
    if name.startswith(_COLUMN) and len(name) > len(_COLUMN):
        return Rule(text, name, values=tuple(value.split(",")))
    bound, _, quantity = name.partition("_")
    known = quantity in _QUANTITIES or (quantity.startswith(_COLUMN) and len(quantity) > len(_COLUMN))
    if bound not in ("min", "max") or not known:
        raise _unreadable(text, f"{name!r} is not a bound")
    try:
        number = float(value)
    except ValueError:
        raise _unreadable(text, f"{value!r} is not a number") from None
    if number != number:
        raise _unreadable(text, f"{value!r} is not a number")
    return Rule(text, quantity, least=number) if bound == "min" else Rule(text, quantity, most=number)


def _unreadable(text: str, why: str) -> DataError:
    return DataError(
        f"--filter {text!r}: {why}. Write min_X=NUMBER or max_X=NUMBER with X one of {', '.join(_QUANTITIES)} or "
        "column:NAME, or column:NAME=VALUE,VALUE, or integrity=FILE; for example min_side=224, max_aspect=2, "
        "min_column:similarity=0.28."
    )
